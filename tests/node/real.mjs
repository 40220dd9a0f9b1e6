// Uses a real model through aiproxy as users of openai-node and of the Vercel AI SDK do.
//
//   AIPROXY_URL=http://…/v1 AIPROXY_KEY=sk-… AIPROXY_MODEL=… node real.mjs
//
// Prints one line of JSON: what each use came to.
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, streamText } from "ai";
import OpenAI from "openai";

const { AIPROXY_URL, AIPROXY_KEY, AIPROXY_MODEL: model } = process.env;
const input = "Say hello.";
const said = {};
globalThis.AI_SDK_LOG_WARNINGS = false;

const client = new OpenAI({ baseURL: AIPROXY_URL, apiKey: AIPROXY_KEY, maxRetries: 0 });
const first = await client.responses.create({ model, input: "My name is Ada.", max_output_tokens: 16 });
const second = await client.responses.create({
  model,
  input: "What is my name?",
  previous_response_id: first.id,
  max_output_tokens: 16,
});
said.turns = [first, second].map((turn) => [turn.usage.input_tokens, turn.output_text.length]);

const stream = client.responses.stream({ model, input, max_output_tokens: 64, temperature: 0 });
let text = "";
const numbers = [];
for await (const event of stream) {
  numbers.push(event.sequence_number);
  if (event.type === "response.output_text.delta") text += event.delta;
}
const final = await stream.finalResponse();
said.helper = { text, final: final.output_text, status: final.status, numbers };

const cut = await client.responses.create({ model, input, max_output_tokens: 4, temperature: 0 });
said.cut = [cut.status, cut.incomplete_details?.reason];

const openai = createOpenAI({ baseURL: AIPROXY_URL, apiKey: AIPROXY_KEY });
const settings = { model: openai(model), maxRetries: 0, maxOutputTokens: 32 };
const whole = await generateText({ ...settings, prompt: input });
const follow = await generateText({
  ...settings,
  prompt: "Again.",
  providerOptions: { openai: { previousResponseId: whole.providerMetadata.openai.responseId } },
});
const streamed = streamText({ ...settings, prompt: input });
let pieces = 0;
for await (const piece of streamed.textStream) pieces += piece.length > 0;
said.ai = {
  texts: [whole.text.length, follow.text.length, (await streamed.text).length],
  reasons: [whole.finishReason, follow.finishReason, await streamed.finishReason],
  inputs: [whole.usage.inputTokens, follow.usage.inputTokens],
  pieces,
};
console.log(JSON.stringify(said));
