#!/bin/sh
# A model changes its mind and changes it back. Run by `make demo`; everything it writes is in .demo/.
set -eu
cd "$(dirname "$0")/.."
work=.demo
facts=examples/news.yaml
patch=$work/news.patch
model=$work/model

bold='' plain=''
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then bold=$(printf '\033[1m') plain=$(printf '\033[0m'); fi

step() { printf '\n%s== %s%s\n' "$bold" "$1" "$plain"; }
run() { # prints a command as one would type it, then runs it
    printf '$'
    for word in "$@"; do
        case $word in *" "*) printf ' "%s"' "$word" ;; *) printf ' %s' "$word" ;; esac
    done
    printf '\n'
    "$@"
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
echo '$ kpatch models smollm2'
source=$(kpatch models smollm2)
echo "$source"
run cp -R "$source" "$model"

step "2. Check the facts"
run kpatch lint "$facts"

step "3. Make the patch"
run kpatch make "$facts" --model smollm2 -o "$patch" --force

step "4. What is in it"
run kpatch show "$patch"

step "5. Ask, before and after: the patch is in memory only, nothing is written"
run kpatch ask "$model" "The Eiffel Tower is located in the city of" "The capital of France is" "The Louvre is located in the city of" --patch "$patch"

step "6. Apply it to the checkpoint directory"
sums "$model" > "$work/before.sha256"
run kpatch apply "$patch" "$model"
run kpatch status "$model"
run kpatch ask "$model" "The Eiffel Tower is located in the city of" --top 3

step "7. Take it back"
run kpatch revert "$model"
run kpatch status "$model"
sums "$model" > "$work/after.sha256"
cmp "$work/before.sha256" "$work/after.sha256"
cat "$work/after.sha256"
echo "every byte of $(wc -l < "$work/after.sha256" | tr -d ' ') files is back"

step "8. And in a chat: a question, before and after"
run kpatch ask "$model" "In which city is the Eiffel Tower?" --chat --patch "$patch"
