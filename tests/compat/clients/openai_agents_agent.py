"""openai-agents' agent with two tools; its answer and the calls it made, as JSON.

Arguments: chat, responses, or kept (responses, each going on from the one before by its id); base URL, model, mode.
"""

import asyncio
import json
import sys

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI

api, url, model, mode = sys.argv[1:]
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
    kind = OpenAIChatCompletionsModel if api == "chat" else OpenAIResponsesModel
    agent = Agent(name="Adder", model=kind(model=model, openai_client=client), tools=[get_weather, add])
    question, is_kept = "How warm is it in all?", api == "kept"
    if mode == "stream":
        result = Runner.run_streamed(agent, question, auto_previous_response_id=is_kept)
        async for _ in result.stream_events():
            pass
    else:
        result = await Runner.run(agent, question, auto_previous_response_id=is_kept)
    print(json.dumps({"answer": result.final_output, "calls": calls}))


asyncio.run(main())
