from benchmarks.static.tool import main

main()
