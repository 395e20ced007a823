#!/usr/bin/env bash
# Everything that needs a GPU, one after the other; what each printed is in OUT, summary.txt says which failed or had no time.
#   benchmarks/gpu/run_all.sh [OUT]        from the repository's root, with vlmteacher installed there
# MINUTES (default 60) is the deadline of the whole: what is still running then is stopped. The order is by what is worth
# most if the time is short. PRESET=smoke runs what needs no GPU, at tiny sizes.
set -u
out=${1:-runs/gpu-$(date +%Y%m%d-%H%M%S)}
python=${PYTHON:-python}
preset=${PRESET:-paper}
deadline=$(($(date +%s) + ${MINUTES:-60} * 60))
if [ "$preset" != smoke ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "run_all.sh: torch sees no GPU: run it on a machine with one (vlmteacher env says more)" >&2
  exit 2
fi
mkdir -p "$out"
failed=0 late=0

run() {  # run NAME COMMAND...: its output to NAME.txt; goes on when it fails, and begins nothing after the deadline
  local name=$1 status=0 left=$((deadline - $(date +%s)))
  shift
  printf '%-28s ' "$name"
  if [ $left -le 0 ]; then
    late=$((late + 1))
    echo "no time left"
    echo "$name: no time left" >>"$out/summary.txt"
    return
  fi
  [ $left -lt "${LIMIT:-1800}" ] || left=${LIMIT:-1800}
  timeout "$left" "$@" >"$out/$name.txt" 2>&1 || status=$?
  [ $status = 0 ] || failed=$((failed + 1))
  [ $status = 0 ] && echo ok || echo "failed ($status): $out/$name.txt"
  echo "$name: exit status $status" >>"$out/summary.txt"
}

run environment "$python" -m vlmteacher env
if [ "$preset" = smoke ]; then
  run paper_scale "$python" -m benchmarks.gpu.paper_scale --preset smoke --device cpu --out "$out/paper_scale" --json
else
  run extension env VLMTEACHER_CUDA=on "$python" setup.py build_ext --inplace
  run nvidia_smi nvidia-smi
  operators=$("$python" -m vlmteacher.ops.manifest)
  for name in $operators; do
    run "check_$name" "$python" -m benchmarks.gpu.$name --check
  done
  run paper_scale "$python" -m benchmarks.gpu.paper_scale --minutes "${PAPER_MINUTES:-9}" --out "$out/paper_scale" --json
  for name in $operators; do
    run "gpu_$name" "$python" -m benchmarks.gpu.$name --json
  done
  for name in $operators; do
    run "bench_$name" "$python" -m benchmarks.$name --device cuda --dtype bfloat16 --json
  done
  for size in tiny mid; do
    run "engines_$size" "$python" -m benchmarks.engines --device cuda --preset $size --json
    run "step_$size" "$python" -m benchmarks.step --device cuda --preset $size --json
  done
  run step_mid_long "$python" -m benchmarks.step --device cuda --preset mid-long --json
  run bench_step_compiled "$python" -m benchmarks.step --device cuda --preset mid --json --variants plain compiled
  run tests_kernels "$python" -m pytest -q tests/kernels tests/ops
fi
echo "$failed failed, $late without time; results in $out"
exit $((failed > 0))
