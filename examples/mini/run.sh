#!/usr/bin/env bash
# Train a model of the embedded size through every stage; see README.md. Give it again after an interruption.
#
#   bash examples/mini/run.sh DATA OUT
#
# STEPS=2: so many steps of each stage, to see the way through. PROMPTS=4000: questions for pairs. TEXT: text files to use.
set -euo pipefail
data=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
prompts=${PROMPTS:-4000}
text=${TEXT:-"text_zh.txt text_en.txt"}
few=(${STEPS:+--steps "$STEPS"})
set_few=(${STEPS:+--set batch.rows=2 --set batch.micro_rows=2 --set compute.precision=fp32 --set evaluate.rows=2
  --set schedule.warmup=0 --set compute.compile=false})
once() { [ -e "$1" ] || "${@:2}"; }  # a step whose result is there is not repeated
to() { "${@:2}" > "$1.part" && mv "$1.part" "$1"; }  # standard output, as a whole or not at all

mkdir -p "$out/data/raw"
for name in corpus-zh corpus-en; do
  once "$out/data/raw/.$name" bash -c "tar -xJf '$data/$name.tar.xz' -C '$out/data/raw' && touch '$out/data/raw/.$name'"
done
raw=$out/data/raw
to "$out/leave-out.txt" python "$here/leave_out.py" "$data/SOURCES.json"

# Data
options=(--leave-out-file "$out/leave-out.txt" --documents blank --length 1024 --allow all)
texts=(); for file in $text; do texts+=("$raw/$file"); done
once "$out/data/text" chatglm data prepare "${texts[@]}" --out "$out/data/text" "${options[@]}"
once "$out/data/chat" chatglm data prepare "$raw"/chat_*.jsonl --out "$out/data/chat" "${options[@]}"
once "$out/data/identity" chatglm data prepare "$raw/identity.jsonl" --out "$out/data/identity" "${options[@]}"
once "$out/data/pretrain.json" chatglm data mix "$out/data/text" "$out/data/chat" "$out/data/identity" \
  --out "$out/data/pretrain.json" --length 1024
once "$out/data/sft.json" chatglm data mix "$out/data/chat=0.93" "$out/data/identity=0.07" \
  --out "$out/data/sft.json" --length 1024

# Stages
run() {  # stage, keys of this run
  chatglm train "$1" "$here/$1.yaml" --out "$out/$1" "${few[@]}" "${set_few[@]}" "${@:2}"
}
run pretrain --set data.train="$out/data/pretrain.json"
start=$out/pretrain/model
[ -z "${STEPS:-}" ] || start=embedded  # after a few steps it would say nothing to learn from
run sft --set model.source="$start" --set data.train="$out/data/sft.json"
once "$out/prompts.jsonl" to "$out/prompts.jsonl" \
  python "$here/pairs.py" prompts "$raw/chat_zh.jsonl" "$out/leave-out.txt" "$prompts"
once "$out/answers.jsonl" chatglm generate "$out/sft/model" --prompts "$out/prompts.jsonl" --out "$out/answers.jsonl" \
  --max-new-tokens 128 --seed 0
to "$out/pairs.jsonl" python "$here/pairs.py" pairs "$out/answers.jsonl"
run reward --set model.source="$out/sft/model" --set data.train="$out/pairs.jsonl"
run bootstrap --set model.source="$out/sft/model" --set data.train="$out/prompts.jsonl" \
  --set data.general="$out/data/sft.json" --set reward.model="$out/reward/model"

# Storage and report
once "$out/model" chatglm quantize "$out/bootstrap/model" --out "$out/model" --dtype int8 --format original --embedding-bits 8
chatglm train plot "$out/pretrain" "$out/sft" --out "$out/curves.png"
shipped=$(python -c 'from chatglm.chat import EMBEDDED_MODEL; print(EMBEDDED_MODEL)')
chatglm eval --suite ability "$shipped" "$out/model" --markdown --out "$out/report.md" ${STEPS:+--most 2}
