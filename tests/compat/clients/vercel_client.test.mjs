// Vercel's `ai` over its OpenAI-compatible provider.
import assert from "node:assert";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embed, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { SCHEMAS } from "./zod_schemas.mjs";

const provider = createOpenAICompatible({
  name: "kvray",
  baseURL: process.env.KVRAY_URL,
  supportsStructuredOutputs: true,
});
const model = provider("guessing");
const asked = { model, prompt: "Who is it?", maxRetries: 0, maxOutputTokens: 4000 };
const brief = { ...asked, maxOutputTokens: 20, temperature: 0 };
const Person = z.object({ name: z.string(), kind: z.string() });
const forced = {
  ...asked,
  tools: { note: tool({ description: "Note a person.", inputSchema: Person }) },
  toolChoice: { type: "tool", toolName: "note" },
};

test("chat", async () => {
  const reply = await generateText(brief);
  assert.ok(reply.text);
  assert.equal(reply.usage.outputTokens, 20);
});

test("stream", async () => assert.ok(await streamText(brief).text));

test("tools", async () => Person.parse((await generateText(forced)).toolCalls[0].input));

test("tool stream", async () => Person.parse((await streamText(forced).toolCalls)[0].input));

test("structured output", async () =>
  Person.parse((await generateText({ ...asked, output: Output.object({ schema: Person }) })).output));

test("structured stream", async () =>
  Person.parse(await streamText({ ...asked, output: Output.object({ schema: Person }) }).output));

test("too long", async () => {
  await assert.rejects(generateText({ ...asked, prompt: "word ".repeat(20000) }), (error) => {
    assert.ok(error instanceof APICallError);
    assert.equal(error.statusCode, 400);
    assert.match(error.message, /maximum context length/);
    return true;
  });
});

test("embeddings refused", async () => {
  const embedding = provider.textEmbeddingModel("guessing");
  await assert.rejects(embed({ model: embedding, value: "a", maxRetries: 0 }), (error) => error.statusCode === 404);
});

for (const [name, schema] of Object.entries(SCHEMAS))
  test(`schemas ${name}`, async (t) => {
    try {
      schema.parse((await generateText({ ...asked, output: Output.object({ schema }) })).output);
    } catch (error) {
      const refused = /grammar refused: ([$a-zA-Z]+)(?: at #|: )/.exec(error.message);
      if (!refused) throw error;
      t.skip(`refused: ${refused[1]}`);
    }
  });
