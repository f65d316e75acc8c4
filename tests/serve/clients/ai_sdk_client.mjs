// The `ai` package of npm, with its provider for services like this one.
import {readFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [url, image, modules] = process.argv.slice(2);
const require = createRequire(`${modules}/`);
const load = (name) => import(pathToFileURL(require.resolve(name)));
const {generateText, streamText, Output, tool} = await load("ai");
const {createOpenAICompatible} = await load("@ai-sdk/openai-compatible");
const {z} = await load("zod");

const provider = createOpenAICompatible({name: "flashvl", baseURL: `${url}/v1`, supportsStructuredOutputs: true});
const model = provider("tiny");
const questions = ["Describe the image.", "How many shapes are there?"];
const first = {role: "user", content: [
  {type: "text", text: questions[0]},
  {type: "file", data: readFileSync(image), mediaType: "image/png"},
]};
const scene = z.object({
  num_shapes: z.number().int().min(0).max(9),
  color: z.enum(["red", "green", "blue"]),
  is_chart: z.boolean(),
});

const reply = await generateText({model, messages: [first], maxRetries: 0});
let stream = "";
for await (const piece of streamText({model, messages: [first], maxRetries: 0}).textStream) stream += piece;
const turns = await generateText({
  model, maxRetries: 0, messages: [first, ...reply.response.messages, {role: "user", content: questions[1]}],
});
const shaped = await generateText({model, messages: [first], maxRetries: 0, output: Output.object({schema: scene})});
const called = await generateText({
  model, messages: [first], maxRetries: 0,
  tools: {report: tool({description: "Report the scene.", inputSchema: scene})},
  toolChoice: {type: "tool", toolName: "report"},
});
const [call] = called.toolCalls;
console.log(JSON.stringify({
  image: reply.text, stream, turns: turns.text, structured: shaped.output,
  tools: {name: call.toolName, arguments: call.input},
}));
