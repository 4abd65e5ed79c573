#!/bin/sh
# A model changes its mind and changes it back. Run by `make demo`; everything it writes lies in .demo/.
set -eu
cd "$(dirname "$0")/.."
work=.demo
facts=examples/news.yaml
patch=$work/news.patch
model=$work/model

step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }
run() {
    printf '$ kpatch'
    for word in "$@"; do
        case $word in *" "*) printf ' "%s"' "$word" ;; *) printf ' %s' "$word" ;; esac
    done
    printf '\n'
    kpatch "$@"
}
sums() {
    python - "$1" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
for path in sorted(path for path in root.rglob("*") if path.is_file() and ".kpatch" not in path.parts):
    print(hashlib.sha256(path.read_bytes()).hexdigest(), path.relative_to(root))
PY
}

rm -rf "$work"
mkdir -p "$work"

step "1. Get the model: SmolLM2-135M-Instruct, converted once to safetensors"
printf '$ kpatch models smollm2\n'
source=$(kpatch models smollm2)
cp -R "$source" "$model"
echo "its checkpoint directory was copied to $model"

step "2. Check the facts"
run lint "$facts"

step "3. Make the patch"
run make "$facts" --model smollm2 -o "$patch" --force

step "4. What is in it"
run show "$patch"

step "5. Ask, before and after: the patch is in memory only, nothing is written"
run ask "$model" "The Eiffel Tower is located in the city of" "The capital of France is" "The Louvre is located in the city of" --patch "$patch"

step "6. Apply it to the checkpoint directory"
sums "$model" > "$work/before.sha256"
run apply "$patch" "$model"
run status "$model"
run ask "$model" "The Eiffel Tower is located in the city of" --top 3

step "7. Take it back"
run revert "$model"
run status "$model"
sums "$model" > "$work/after.sha256"
cmp "$work/before.sha256" "$work/after.sha256"
cat "$work/after.sha256"
echo "every byte of $(wc -l < "$work/after.sha256" | tr -d ' ') files is back"
