// Addresses and words for runs.
export const runUrl = (run) => `api/runs/${encodeURIComponent(run.name)}`;

// The time of the file is part of the address: a file that has changed is fetched anew.
export const fileUrl = (run, kind) => `files/${encodeURIComponent(run.name)}/${kind}?${run.files[kind]}`;

export const drawnUrl = (run, kind) => `drawn/${encodeURIComponent(run.name)}/${kind}?${run.files[kind]}`;

export const downloadUrl = (run, kind) => `files/${encodeURIComponent(run.name)}/${kind}?download`;

// The prompt that it was asked for, and the one that it was steered to in its live view.
export const called = (run) => [run.prompt || run.name, run.steered].filter(Boolean).join(" → ");

export function title(list, name) {
  return list.find((each) => each.name === name)?.title ?? name ?? "";
}

export function say(run, offered) {
  const words = [title(offered.representations, run.on), title(offered.methods, run.method)];
  if (run.quality) words.push(title(offered.qualities, run.quality).toLowerCase());
  if (run.seed) words.push(`seed ${run.seed}`);
  return words.join(" · ");
}
