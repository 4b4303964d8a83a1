// Schemas as applications have them, of all kinds that zod writes a JSON schema for.
import { z } from "zod";

const Plain = z.object({ name: z.string(), age: z.number().int(), score: z.number(), ok: z.boolean() });
const Cat = z.object({ kind: z.literal("cat"), lives: z.number().int() });
const Dog = z.object({ kind: z.literal("dog"), tricks: z.array(z.string()) });
const Tree = z.object({
  value: z.number(),
  get children() {
    return z.array(Tree);
  },
});

export const SCHEMAS = {
  plain: Plain,
  nested: z.object({ one: Plain, many: z.array(Plain) }),
  optional: z.object({ a: z.string().optional(), b: z.number().nullable(), c: z.string().nullish() }),
  defaults: z.object({ a: z.string().default("x"), b: z.array(z.number()).default([]) }),
  enums: z.object({ color: z.enum(["red", "green"]), level: z.union([z.literal(1), z.literal(2)]) }),
  bounds: z.object({ small: z.number().int().min(0).max(10), part: z.number().gt(0).lt(1), even: z.number().multipleOf(2) }),
  integers: z.object({ safe: z.number().int(), i32: z.int32(), positive: z.number().int().positive() }),
  texts: z.object({ code: z.string().regex(/^[A-Z]{3}-\d{4}$/), short: z.string().min(1).max(8) }),
  starts: z.object({ start: z.string().startsWith("ab"), low: z.string().lowercase() }),
  formats: z.object({ id: z.uuid(), mail: z.email(), day: z.iso.date(), moment: z.iso.datetime(), clock: z.iso.time() }),
  networks: z.object({ four: z.ipv4(), six: z.ipv6(), net: z.cidrv4(), site: z.url() }),
  encodings: z.object({ raw: z.base64(), url: z.base64url(), nano: z.nanoid() }),
  ids: z.object({ cuid: z.cuid(), cuid2: z.cuid2(), ulid: z.ulid(), guid: z.guid() }),
  emoji: z.object({ mood: z.emoji() }),
  lists: z.object({ few: z.array(z.number()).min(1).max(3), deep: z.array(z.array(z.array(z.boolean()))) }),
  tuples: z.object({ pair: z.tuple([z.string(), z.number()]), more: z.tuple([z.string()], z.number()) }),
  records: z.object({ words: z.record(z.string(), z.number()), by: z.partialRecord(z.enum(["a", "b"]), z.boolean()) }),
  union: z.object({ pet: z.union([Cat, Dog, z.string()]) }),
  discriminated: z.object({ pet: z.discriminatedUnion("kind", [Cat, Dog]) }),
  intersection: z.object({ both: z.intersection(Plain, z.object({ more: z.string() })) }),
  extended: Plain.extend({ more: z.string() }).omit({ score: true }).partial(),
  tree: Tree,
  open: z.looseObject({ a: z.number() }),
  closed: z.strictObject({ a: z.number() }),
  rest: z.object({ a: z.string() }).catchall(z.number()),
  anything: z.object({ any: z.any(), unknown: z.unknown() }),
  empty: z.object({}),
  nulls: z.object({ nothing: z.null() }),
  described: z.object({ step: z.string().describe('what is "done"') }).meta({ title: "A step" }),
  branded: z.object({ id: z.string().brand("Id") }).readonly(),
  refined: z.object({ name: z.string().refine(() => true), low: z.string().toLowerCase() }),
};
