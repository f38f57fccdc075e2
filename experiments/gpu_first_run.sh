#!/usr/bin/env bash
# What to run first on a new card: does training work on it, and how fast? It ends within seven minutes.
#
#     experiments/gpu_first_run.sh [FOLDER [key=value ...]]
#
# FOLDER receives all results as they are made, runs/gpu_first_run by default. The keys are those of
# `python -m experiments.benchmark gpu`. What is not installed, such as vLLM, is skipped, and the summary says so.
#
#     PYTHON=python        the command that starts Python, instead of `uv run --no-sync python`
#     GPU_CHECK_DEVICE=cpu tries the script on a CPU, with a tiny model; another card is cuda:1
#     TIME_LIMIT=420       seconds for everything. Every part has to end by its share of them
#
# The exit status is 1 if a part failed. The parts after it run all the same.

set -u
folder=$(realpath -m "${1:-"$(dirname "$0")/../runs/gpu_first_run"}")
keys=("device=${GPU_CHECK_DEVICE:-cuda:0}" "${@:2}")
if [[ ${GPU_CHECK_DEVICE:-} == cpu ]]; then keys+=(shape=tiny); fi
limit=${TIME_LIMIT:-420}
read -ra python <<< "${PYTHON:-uv run --no-sync python}"
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$folder" || exit 1
rm -f "$folder"/{check,benchmark}_{training,engine}.{log,jsonl,csv} "$folder"/{parts.csv,summary.md}
echo "part,status,seconds" > "$folder/parts.csv"
all_passed=true

# run_part NAME SHARE COMMAND ...: run a command, which has to end when SHARE percent of the whole time are over.
run_part() {
    local name=$1 left=$((limit * $2 / 100 - SECONDS)) started=$SECONDS status
    echo "$name: at most $left s, log in $folder/$name.log"
    timeout --kill-after=10 "$((left > 1 ? left : 1))" "${@:3}" > "$folder/$name.log" 2>&1 &
    trap 'kill "$!"; wait "$!"; exit 130' INT TERM # timeout hands the signal on to all processes of the part
    wait "$!"
    status=$?
    trap - INT TERM
    echo "$name,$status,$((SECONDS - started))" >> "$folder/parts.csv"
    if ((status)); then
        all_passed=false
        local why="exit status $status"
        if ((status == 124)); then why="cut off at its share of the time (TIME_LIMIT=720 gives it more)"; fi
        echo "$name: $why; the last line of its log: $(tail -n 1 "$folder/$name.log")"
    fi
}

check() {
    run_part "check_$1" "$2" env "GPU_CHECK_JSONL=$folder/check_$1.jsonl" "${python[@]}" -m pytest tests/gpu "${@:3}"
}

benchmark() {
    run_part "benchmark_$1" "$2" "${python[@]}" -m experiments.benchmark gpu "part=$1" \
        "results=$folder/benchmark_$1.csv" "${@:3}" "${keys[@]}"
}

# docs/gpu.md has the seconds that each part takes by estimate. For more, the time would not suffice.
check training 28 -m "gpu and not engine"
benchmark training 50
check engine 70 -m "gpu and engine" -k "not killed" # the run that is killed starts two engines of its own
benchmark engine 97 num_engine_repetitions=1
"${python[@]}" -m experiments.benchmark.first_run "$folder" | tee "$folder/summary.md"
((PIPESTATUS[0] == 0)) && $all_passed
