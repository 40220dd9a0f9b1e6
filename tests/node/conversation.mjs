// Holds a conversation as users of the Vercel AI SDK do, all settings left at their defaults.
//
//   AIPROXY_URL=http://…/v1 AIPROXY_KEY=sk-… AIPROXY_MODEL=… node conversation.mjs
//
// Prints one line of JSON: what each turn said, every request body that the SDK sent, its warnings.
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";

const { AIPROXY_URL, AIPROXY_KEY, AIPROXY_MODEL } = process.env;
const WEATHER = { Bern: "rain", Zürich: "sun" };
const sent = [];
const turns = [];
const warnings = [];
globalThis.AI_SDK_LOG_WARNINGS = ({ warnings: more }) => warnings.push(...more);

const openai = createOpenAI({
  baseURL: AIPROXY_URL,
  apiKey: AIPROXY_KEY,
  fetch: (url, options) => {
    sent.push(JSON.parse(options.body));
    return fetch(url, options);
  },
});
const settings = {
  model: openai(AIPROXY_MODEL),
  maxRetries: 0,
  stopWhen: stepCountIs(5),
  tools: {
    get_weather: tool({
      description: "Say what the weather is in a city.",
      inputSchema: jsonSchema({
        type: "object",
        properties: { city: { type: "string" } },
        required: ["city"],
        additionalProperties: false,
      }),
      execute: async ({ city }) => WEATHER[city],
    }),
  },
};
const user = (content) => ({ role: "user", content });

async function told(result) {
  const steps = await result.steps;
  const messages = (await result.response).messages;
  const id = (await result.providerMetadata).openai.responseId;
  turns.push({ text: await result.text, steps: steps.length, id });
  return { id, messages };
}

async function generate(request) {
  return told(await generateText({ ...settings, ...request }));
}

async function stream(request) {
  const errors = [];
  const onError = ({ error }) => errors.push(error);
  const result = streamText({ ...settings, onError, ...request });
  let text = "";
  for await (const piece of result.textStream) text += piece;
  if (errors.length > 0) throw errors[0];
  const done = await told(result);
  if (!text.endsWith(turns.at(-1).text)) throw new Error(`streamed: ${text}`);
  return done;
}

const after = (id) => ({ providerOptions: { openai: { previousResponseId: id } } });

// The client keeps the conversation and sends all of it back, what came from the API by reference.
const messages = [user("Weather in Bern?")];
messages.push(...(await generate({ messages })).messages);
messages.push(user("Weather in Zürich?"));
messages.push(...(await stream({ messages })).messages);
messages.push(user("Is that all?"));
let last = await generate({ messages });

// The API keeps the conversation: new input alone, a tool loop within, and a reference to what the
// previous response has already.
last = await stream({ prompt: "Are you sure?", ...after(last.id) });
last = await generate({ prompt: "Weather in Bern?", ...after(last.id) });
await generate({ messages: [last.messages.at(-1), user("And now?")], ...after(last.id) });

console.log(JSON.stringify({ turns, sent, warnings }));
