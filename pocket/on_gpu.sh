#!/usr/bin/env bash
# Trains a model on a GPU from a pack (python -m pocket.pack make), in the root of this repository:
#   bash pocket/on_gpu.sh PACK OUT unet|flow|views STEPS [BATCH]
# The four views begin with the UNet that is shipped, whose autoencoder the pack must have.
# OUT gets the averaged weights in parts, the log, and the last sheet of samples. If the time that
# the machine is lent for ends first, end this script with SIGTERM: it still writes them.
set -euo pipefail
pack=$1 out=$2 name=$3 steps=$4 batch=${5:-512}
work=$(mktemp -d)
mkdir -p "$out"
python3 -m pocket.pack unpack --from "$pack" --work "$work"
if [ "$name" = views ]; then
  python3 -m pocket.pack adopt --name unet --work "$work" \
    --from custom/threestudio-lods/lods/models/pocket
fi
finish() {
  python3 -m pocket.pack weights --work "$work" --name "$name" --to "$out"
  sheet=$(ls -t "$work"/sheets/*.png 2>/dev/null | head -n 1)
  [ -z "$sheet" ] || cp "$sheet" "$out/"
  rm -rf "$work"
}
python3 -m pocket.make --work "$work" --stages "$name" --device cuda "--$name-steps" "$steps" \
  --batch "$batch" > "$out/$name.log" 2>&1 &
training=$!
trap 'kill -TERM $training' TERM INT
status=0
wait $training || status=$?
trap '' TERM INT
wait $training 2>/dev/null || true
finish
exit $status
