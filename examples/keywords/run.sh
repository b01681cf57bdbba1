#!/usr/bin/env bash
# The whole way, from weights and recordings to a label: the commands that a person types, printed.
#
#     bash examples/keywords/run.sh MODEL RECORDINGS.zip OUT OWNER OWNER
#
# MODEL has kwt1.safetensors and labels.txt. Run it in the repository's root.
set -euo pipefail
[ $# -eq 5 ] || { sed -n '4,6s/^# *//p' "$0" >&2; exit 2; }
export KWT=$1 WORDS=$3/words.safetensors OMP_NUM_THREADS=1
out=$3 one=$4 two=$5
spotter=examples/keywords/spotter.py
module=examples.keywords.spotter
here="--preprocessor examples/keywords"
PS4='$ '
set -x
python $spotter "$2" "$out" "$one" "$two"
regrow adapt $module:published --data "$out/base" --method head --head new --coefficient-dtype fp16 \
  $here --labels "$KWT/labels.txt" --threads 1 -o "$WORDS"
ls "$out/base" > "$out/labels.txt"
regrow export $module:with_words -o "$out/bundle" --precision int8 $here --labels "$out/labels.txt"
regrow adapt $module:with_words --data "$out/owners" --users folder $here --labels "$out/labels.txt" \
  --steps 120 --threads 1 -o "$out/adapters"
regrow store add "$out/store" "$one" "$out/adapters/$one.safetensors" --bundle "$out/bundle" --activate
regrow store add "$out/store" "$two" "$out/adapters/$two.safetensors" --bundle "$out/bundle" --activate
ulimit -d 131072 # kilobytes: what follows has 128 MB
for owner in "$one" "$two"; do
  taskset -c 0 regrow run "$out/bundle" --profile memory --threads 1 --wav "$out/test/$owner"
  taskset -c 0 regrow run "$out/bundle" --profile memory --threads 1 --wav "$out/test/$owner" \
    --store "$out/store" --user "$owner"
done
