#!/usr/bin/env bash
# Everything that needs a GPU, one after the other; what each printed is in OUT, summary.txt says which failed.
#   benchmarks/gpu/run_all.sh [OUT]        from the repository's root, with vlmteacher installed there
set -u
out=${1:-runs/gpu-$(date +%Y%m%d-%H%M%S)}
python=${PYTHON:-python}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "run_all.sh: torch sees no GPU: run it on a machine with one (vlmteacher env says more)" >&2
  exit 2
fi
mkdir -p "$out"
failed=0

run() {  # run NAME COMMAND...: its output to NAME.txt; goes on when it fails
  local name=$1 status=0
  shift
  printf '%-28s ' "$name"
  timeout "${LIMIT:-1800}" "$@" >"$out/$name.txt" 2>&1 || status=$?
  [ $status = 0 ] || failed=$((failed + 1))
  [ $status = 0 ] && echo ok || echo "failed ($status): $out/$name.txt"
  echo "$name: exit status $status" >>"$out/summary.txt"
}

run environment "$python" -m vlmteacher env
run nvidia_smi nvidia-smi
run tests_kernels "$python" -m pytest -q tests/kernels tests/ops
operators=$("$python" -m vlmteacher.ops.manifest)
for name in $operators; do
  run "check_$name" "$python" -m benchmarks.gpu.$name --json
done
for name in $operators; do
  run "bench_$name" "$python" -m benchmarks.$name --device cuda --dtype bfloat16 --json
done
for preset in tiny mid; do
  run "engines_$preset" "$python" -m benchmarks.engines --device cuda --preset $preset --json
  run "step_$preset" "$python" -m benchmarks.step --device cuda --preset $preset --json
done
run step_mid_long "$python" -m benchmarks.step --device cuda --preset mid-long --json
run bench_step_compiled "$python" -m benchmarks.step --device cuda --preset mid --json --variants plain compiled
echo "$failed failed; results in $out"
exit $((failed > 0))
