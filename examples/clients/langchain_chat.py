"""Talk to `chatglm serve` with LangChain: pip install langchain-openai; python examples/clients/langchain_chat.py."""

import os

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    model="chatglm",
    base_url=os.environ.get("CHATGLM_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("CHATGLM_API_KEY", "none"),
    temperature=0,
    max_tokens=64,
)

print(model.invoke([SystemMessage("Answer in one sentence."), HumanMessage("你好")]).content)

for piece in model.stream("What is your name?"):
    print(piece.content, end="", flush=True)
print()

place = model.with_structured_output(
    {
        "title": "Place",
        "type": "object",
        "properties": {"size": {"type": "string", "enum": ["small", "large"]}},
        "required": ["size"],
        "additionalProperties": False,
    },
    method="json_schema",
)
print(place.invoke("北京大吗？"))
