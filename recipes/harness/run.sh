#!/bin/sh
# Two evaluation harnesses against a server that runs (nanoglm serve): lm-evaluation-harness over both of OpenAI's
# completions, inspect-ai over chat. They are installed beside nanoglm, not by it: pip install 'lm-eval[api]' transformers inspect-ai openai
#   sh recipes/harness/run.sh http://127.0.0.1:8000 [MODEL] [TOKENIZER] [COUNT]
set -eu
url=${1:?the URL of a server} model=${2:-assistant} tokenizer=${3:-nanoglm/assets/assistant} count=${4:-100}
here=$(cd "$(dirname "$0")" && pwd) tokenizer=$(cd "$tokenizer" && pwd)
work=$(mktemp -d) && cd "$work"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 NANOGLM_API_KEY="${NANOGLM_API_KEY:-none}" OPENAI_API_KEY="${NANOGLM_API_KEY:-none}"
${NANOGLM_PYTHON:-python} "$here/sums.py" sums.jsonl --count "$count"
cp "$here"/*.yaml "$here"/sums_inspect.py .  # inspect-ai takes paths below where it runs
lm_eval --model local-chat-completions --apply_chat_template --tasks sums_chat --include_path . \
    --model_args "model=$model,base_url=$url/v1/chat/completions,num_concurrent=8,tokenizer_backend=None"
lm_eval --model local-completions --tasks sums_choice --include_path . \
    --model_args "model=$model,base_url=$url/v1/completions,num_concurrent=8,tokenizer=$tokenizer,max_length=2048"
inspect eval sums_inspect.py -T file="$work/sums.jsonl" --model "openai-api/nanoglm/$model" \
    --model-base-url "$url/v1" --display plain --no-log-realtime --max-connections 8 --log-dir "$work/logs"
