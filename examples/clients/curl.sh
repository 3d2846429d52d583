#!/usr/bin/env bash
# Talk to `chatglm serve` with curl.
set -euo pipefail
url="${CHATGLM_URL:-http://127.0.0.1:8000}"
ask() { curl --silent --show-error --fail-with-body -H 'Content-Type: application/json' -H "Authorization: Bearer ${CHATGLM_API_KEY:-none}" "$@"; }

ask "$url/v1/models"; echo
ask "$url/v1/chat/completions" -d '{"model": "chatglm", "messages": [{"role": "user", "content": "你好"}], "temperature": 0}'; echo
ask --no-buffer "$url/v1/chat/completions" \
  -d '{"model": "chatglm", "messages": [{"role": "user", "content": "你好"}], "temperature": 0, "stream": true}'
ask "$url/v1/completions" -d '{"model": "chatglm", "prompt": "今天天气", "max_tokens": 8, "temperature": 0}'; echo
ask "$url/tokenize" -d '{"text": "你好"}'; echo
