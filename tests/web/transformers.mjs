// Continues a prompt with transformers.js under Node; prints the texts and the dtypes of the graphs as JSON.
// Arguments: the directory of the exports, and the cases as JSON: [{model, dtype (if not the one of config.json)}].
import { env, pipeline } from "@huggingface/transformers";

const [exports_, cases] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = exports_;

const results = [];
for (const { model, dtype } of JSON.parse(cases)) {
  const generate = await pipeline("text-generation", model, { ...(dtype && { dtype }) });
  const [{ generated_text }] = await generate("import os", { max_new_tokens: 12, do_sample: false });
  results.push([generated_text, generate.model.sessions.model.config.dtype]);
}
console.log(JSON.stringify(results));
