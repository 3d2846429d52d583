"""Talk to `chatglm serve` with the openai SDK: pip install openai; python examples/clients/openai_sdk.py."""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("CHATGLM_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("CHATGLM_API_KEY", "none"),
)

answer = client.chat.completions.create(
    model="chatglm", messages=[{"role": "user", "content": "你好"}], temperature=0, max_tokens=64
)
print(answer.choices[0].message.content)
print(answer.usage)

stream = client.chat.completions.create(
    model="chatglm", messages=[{"role": "user", "content": "What is your name?"}], temperature=0, stream=True
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

vector = client.embeddings.create(model="chatglm", input="你好").data[0].embedding
print(f"a vector of {len(vector)} numbers")
