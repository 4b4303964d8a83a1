// The openai client for Node, with zod's schemas as its helpers write them.
import assert from "node:assert";
import { test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat, zodFunction } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.env.KVRAY_URL, apiKey: "unused", maxRetries: 0 });
const model = "guessing";
const messages = [{ role: "user", content: "Who is it?" }];
const Person = z.object({ name: z.string(), kind: z.string() });
const forced = {
  tools: [zodFunction({ name: "note", parameters: Person })],
  tool_choice: { type: "function", function: { name: "note" } },
};

test("chat", async () => {
  const reply = await client.chat.completions.create({ model, messages, max_tokens: 20, temperature: 0 });
  assert.ok(reply.choices[0].message.content);
  assert.equal(reply.usage.completion_tokens, 20);
});

test("stream", async () => {
  let text = "";
  const options = { stream: true, max_tokens: 20, temperature: 0 };
  for await (const chunk of await client.chat.completions.create({ model, messages, ...options }))
    text += chunk.choices[0]?.delta.content ?? "";
  assert.ok(text);
});

test("tools", async () => {
  const reply = await client.chat.completions.parse({ model, messages, ...forced });
  Person.parse(reply.choices[0].message.tool_calls[0].function.parsed_arguments);
});

test("tool stream", async () => {
  const whole = await client.chat.completions.stream({ model, messages, ...forced }).finalChatCompletion();
  Person.parse(JSON.parse(whole.choices[0].message.tool_calls[0].function.arguments));
});

test("structured output", async () => {
  const reply = await client.chat.completions.parse({
    model,
    messages,
    response_format: zodResponseFormat(Person, "person"),
  });
  Person.parse(reply.choices[0].message.parsed);
});

test("responses", async () => {
  const text = { format: zodTextFormat(Person, "person") };
  const reply = await client.responses.parse({ model, input: "Who is it?", text });
  Person.parse(reply.output_parsed);
  const stream = client.responses.stream({ model, input: "And?", previous_response_id: reply.id });
  assert.equal((await stream.finalResponse()).status, "completed");
});

test("logprobs", async () => {
  const options = { logprobs: true, top_logprobs: 2, max_tokens: 5, temperature: 0 };
  const reply = await client.chat.completions.create({ model, messages, ...options });
  assert.deepEqual(reply.choices[0].logprobs.content.map((token) => token.top_logprobs.length), [2, 2, 2, 2, 2]);
});

test("too long", async () => {
  const long = [{ role: "user", content: "word ".repeat(20000) }];
  await assert.rejects(client.chat.completions.create({ model, messages: long }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.code, "context_length_exceeded");
    return true;
  });
});

test("embeddings refused", async () => {
  await assert.rejects(client.embeddings.create({ model, input: "a" }), OpenAI.NotFoundError);
});
