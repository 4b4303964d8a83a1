"""openai-agents' agent with two tools; its answer and the calls it made, as JSON. Arguments: base URL, model, mode."""

import asyncio
import json
import sys

from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI

url, model, mode = sys.argv[1:]
calls = []


@function_tool
def get_weather(city: str, days: int) -> str:
    """Weather of a city."""
    calls.append(["get_weather", {"city": city, "days": days}])
    return {"Oslo": "3", "Rome": "20.5"}[city]


@function_tool
def add(numbers: list[float]) -> str:
    """Add numbers."""
    calls.append(["add", {"numbers": numbers}])
    return str(sum(numbers))


async def main() -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=url, api_key="unused")
    agent = Agent(
        name="Adder", model=OpenAIChatCompletionsModel(model=model, openai_client=client), tools=[get_weather, add]
    )
    if mode == "stream":
        result = Runner.run_streamed(agent, "How warm is it in all?")
        async for _ in result.stream_events():
            pass
    else:
        result = await Runner.run(agent, "How warm is it in all?")
    print(json.dumps({"answer": result.final_output, "calls": calls}))


asyncio.run(main())
