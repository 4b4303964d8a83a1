"""LangChain's agent with two tools; its answer and the calls it made, as JSON. Arguments: base URL, model, mode."""

import json
import sys

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

url, model, mode = sys.argv[1:]
calls = []


@tool
def get_weather(city: str, days: int = 1) -> str:
    """Weather of a city."""
    calls.append(["get_weather", {"city": city, "days": days}])
    return {"Oslo": "3", "Rome": "20.5"}[city]


@tool
def add(numbers: list[float]) -> str:
    """Add numbers."""
    calls.append(["add", {"numbers": numbers}])
    return str(sum(numbers))


chat = ChatOpenAI(base_url=url, model=model, api_key="unused", streaming=mode == "stream")
agent = create_agent(chat, [get_weather, add])
question = {"messages": [{"role": "user", "content": "How warm is it in all?"}]}
states = agent.stream(question, stream_mode="values") if mode == "stream" else [agent.invoke(question)]
final = list(states)[-1]
print(json.dumps({"answer": final["messages"][-1].text, "calls": calls}))
