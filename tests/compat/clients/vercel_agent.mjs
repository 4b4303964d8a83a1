// Vercel's `ai` with two tools; its answer and the calls it made, as JSON. Arguments: base URL, model, mode.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [url, model, mode] = process.argv.slice(2);
const calls = [];
const options = {
  model: createOpenAICompatible({ name: "kvray", baseURL: url })(model),
  prompt: "How warm is it in all?",
  stopWhen: stepCountIs(5),
  tools: {
    get_weather: tool({
      description: "Weather of a city.",
      inputSchema: z.object({ city: z.string(), days: z.number().int() }),
      execute: async (input) => {
        calls.push(["get_weather", input]);
        return { Oslo: "3", Rome: "20.5" }[input.city];
      },
    }),
    add: tool({
      description: "Add numbers.",
      inputSchema: z.object({ numbers: z.array(z.number()) }),
      execute: async (input) => {
        calls.push(["add", input]);
        return String(input.numbers.reduce((sum, number) => sum + number, 0));
      },
    }),
  },
};
const result = mode === "stream" ? streamText(options) : await generateText(options);
console.log(JSON.stringify({ answer: await result.text, calls }));
