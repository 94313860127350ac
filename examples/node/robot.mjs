// A robot with one lamp that takes a goal from edge-agent, over the unix socket.
//
//     node robot.mjs [SOCKET [GOAL]]
//
// Prints the answer and exits 0; on an error prints its reason and the wrong fields and exits 1.

import { fileURLToPath } from 'node:url';

import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';
import protobuf from 'protobufjs';

const [
  socket = `${process.env.XDG_RUNTIME_DIR ?? '/run'}/edge-agent/api.sock`,
  goal = 'Turn the lamp on.',
] = process.argv.slice(2);
const includeDirs = ['../../proto', '../protos'].map((path) =>
  fileURLToPath(new URL(path, import.meta.url)),
);

// The tools: what the model is told about each, and what the robot does.
const tools = {
  set_lamp: {
    description: 'Switch the lamp.',
    input_schema_json: JSON.stringify({
      type: 'object',
      properties: { on: { type: 'boolean' } },
      required: ['on'],
      additionalProperties: false,
    }),
    examples: [{ goal: 'Lights out.', arguments_json: '{"on": false}' }],
    execute: ({ on }) => `the lamp is ${on ? 'on' : 'off'}`,
  },
};

/** Gives the goal in one conversation; resolves to the run as it ended. */
function converse(client) {
  return new Promise((resolve, reject) => {
    const metadata = new grpc.Metadata();
    metadata.set('edge-agent-client', 'node');
    const call = client.Converse(metadata);
    let run;
    call.on('error', reject);
    call.on('status', () => (run ? resolve(run) : reject(new Error('no run_finished came'))));
    call.on('data', ({ event }) => {
      if (event.tool_calls_issued) {
        // At once, so long before a call's `valid_for` is over.
        const results = event.tool_calls_issued.tool_calls.map(execute);
        call.write({ tool_results: { results } });
      } else if (event.run_finished) {
        run = event.run_finished.run;
        call.end();
      }
    });
    call.write({
      start: {
        spec: {
          messages: [{ role: 'ROLE_USER', parts: [{ text: goal }] }],
          tools: Object.entries(tools).map(([name, { execute: _, ...tool }]) => ({ name, ...tool })),
          limits: { max_steps: 3, max_output_tokens: 64 },
        },
      },
    });
  });
}

/** Executes a tool call; gives its result. */
function execute(toolCall) {
  console.log(`tool call    ${toolCall.name}(${toolCall.arguments_json})`);
  let text;
  let failed = false;
  try {
    text = tools[toolCall.name].execute(JSON.parse(toolCall.arguments_json));
  } catch (error) {
    text = `${error}`;
    failed = true;
  }
  console.log(`tool ${failed ? 'error ' : 'result'}  ${text}`);
  return { tool_call_id: toolCall.id, parts: [{ text }], is_error: failed };
}

/** Prints a failed call's reason and every wrong field, from google.rpc.Status in its trailer. */
function printError(error) {
  const [trailer] = error.metadata?.get('grpc-status-details-bin') ?? [];
  const types = new protobuf.Root();
  types.resolvePath = (_, path) => `${includeDirs[1]}/${path}`;
  types.loadSync(['google/rpc/status.proto', 'google/rpc/error_details.proto']);
  const status = types.lookupType('google.rpc.Status').decode(trailer ?? Buffer.alloc(0));
  const details = new Map(
    status.details.map(({ type_url: url, value }) => {
      const name = url.slice(url.lastIndexOf('/') + 1);
      return [name, types.lookupType(name).decode(value)];
    }),
  );
  const reason = details.get('google.rpc.ErrorInfo')?.reason ?? grpc.status[error.code] ?? error.name;
  console.error(`error: ${reason}: ${error.details ?? error.message}`);
  for (const wrong of details.get('google.rpc.BadRequest')?.fieldViolations ?? []) {
    console.error(`  ${wrong.field}: ${wrong.description}`);
  }
}

const api = grpc.loadPackageDefinition(
  protoLoader.loadSync('edge_agent/v1/run_service.proto', {
    includeDirs,
    keepCase: true,
    enums: String,
    longs: String,
  }),
).edge_agent.v1;
const client = new api.RunService(`unix:${socket}`, grpc.credentials.createInsecure());
try {
  console.log(`goal         ${goal}`);
  const run = await converse(client);
  if (run.error) {
    console.error(`error: ${run.error.reason}: ${run.error.message}`);
    process.exitCode = 1;
  } else {
    console.log(`answer       ${run.answer}`);
  }
} catch (error) {
  printError(error);
  process.exitCode = 1;
} finally {
  client.close();
}
