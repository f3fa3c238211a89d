#!/usr/bin/env bash
# The steps of action.yml: `convert.sh keys | install | convert`.
# Inputs are environment variables, INPUT_SOURCE and so on: their text is never part of a script. Bash 3.2, as on macOS.
set -euo pipefail

ACTION="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
VENV="$RUNNER_TEMP/gptconvert"
#: Copies of the reports, cached with the result.
STORE="$RUNNER_TEMP/gptconvert-reports"
SUMMARY="$STORE/summary.md"
PATH="$VENV/bin:$PATH"
SHA256=(sha256sum)
command -v sha256sum > /dev/null || SHA256=(shasum -a 256) # macOS

random() {
  od -An -N16 -tx1 /dev/urandom | tr -d ' \n'
}

# Set an output. The delimiter is random, so that no value can contain it and set another output.
output() {
  local mark
  mark="$(random)"
  printf '%s<<%s\n%s\n%s\n' "$1" "$mark" "$2" "$mark" >> "$GITHUB_OUTPUT"
}

digest() {
  "${SHA256[@]}" | cut -d ' ' -f 1
}

# The names and contents of the files in a directory.
contents() {
  (cd -- "$1" && find -L . -type f -not -path './.git/*' -not -path '*/__pycache__/*' -print0 \
    | LC_ALL=C sort -z | xargs -0 "${SHA256[@]}" --)
}

# ARGUMENTS: each line of INPUT_OPTIONS is a flag, or a flag and its value, which may contain spaces.
read_options() {
  local flag value
  ARGUMENTS=()
  while read -r flag value; do
    [[ -z $flag ]] || ARGUMENTS+=("$flag")
    [[ -z $value ]] || ARGUMENTS+=("$value")
  done <<< "$INPUT_OPTIONS"
}

# Everything that a result depends on. Fails if that is not known without the network: hub repositories may change.
request() {
  local word folder="$INPUT_SOURCE"
  read_options
  compgen -G "$(printf '%q' "$INPUT_SOURCE")*" > /dev/null || return 1
  printf '%s\n' "$INPUT_FORMAT" "$INPUT_TARGETS" "$INPUT_OPTIONS" "$INPUT_REPORT"
  env | grep '^GPTCONVERT_' | LC_ALL=C sort || true
  for word in "${ARGUMENTS[@]+"${ARGUMENTS[@]}"}"; do
    case "$word" in --adapter* | --base*) return 1 ;; esac
    if [[ -d $word ]]; then contents "$word" || return 1; fi
    if [[ -f $word ]]; then digest < "$word" || return 1; fi
  done
  [[ -d $folder ]] || folder="$(dirname -- "$folder")" # of a file or prefix: other files of the checkpoint are beside it
  contents "$folder" && contents "$ACTION/gptconvert" && digest < "$ACTION/constraints.txt"
}

# Outputs: `pip`, the key of downloaded packages, and `result`, the start of the key of a result, if there can be one.
keys() {
  local found
  output pip "gptconvert-pip-$RUNNER_OS-$(cat "$ACTION/constraints.txt" "$ACTION/pyproject.toml" | digest)"
  if [[ $INPUT_CACHE == true && ! -e $INPUT_OUTPUT ]] && found="$(request)"; then
    output result "gptconvert-$RUNNER_OS-$(digest <<< "$found")-"
  fi
}

install() {
  local extras="${INPUT_EXTRAS:+[$INPUT_EXTRAS]}"
  "$PYTHON" -m venv "$VENV"
  pip --disable-pip-version-check install --quiet --constraint "$ACTION/constraints.txt" "$ACTION$extras"
}

# Whether the cache had a complete result: its manifest has the digest in the key, and its files those in SHA256SUMS.
restored() {
  [[ -n ${CACHED_KEY-} && -f $INPUT_OUTPUT/manifest.json && -f $SUMMARY ]] || return 1
  [[ $CACHED_KEY == *-"$(digest < "$INPUT_OUTPUT/manifest.json")" ]] || return 1
  (cd -- "$INPUT_OUTPUT" && "${SHA256[@]}" --check --status SHA256SUMS)
}

# Run gptconvert. What it prints may quote a checkpoint's names, so the runner must not read commands from it.
run() {
  local token path code=0
  local words=("$INPUT_FORMAT")
  read_options
  words+=("${ARGUMENTS[@]+"${ARGUMENTS[@]}"}" "--to=$INPUT_TARGETS" "--output=$INPUT_OUTPUT" "--report=$SUMMARY")
  while IFS= read -r path; do
    [[ -z $path ]] || words+=("--report=$path")
  done <<< "$INPUT_REPORT"
  [[ -z ${CACHED_KEY-} ]] || words+=(--force)
  token="$(random)"
  echo "::stop-commands::$token"
  gptconvert "${words[@]}" -- "$INPUT_SOURCE" || code=$?
  echo "::$token::"
  return "$code"
}

# Copy the reports into the store, or out of it: `reports save`, `reports restore`.
reports() {
  local path number=0
  while IFS= read -r path; do
    [[ -n $path ]] || continue
    number=$((number + 1))
    case "$1" in
      save) [[ ! -f $path ]] || cp -- "$path" "$STORE/$number" ;;
      restore) mkdir -p -- "$(dirname -- "$path")" && cp -- "$STORE/$number" "$path" ;;
    esac
  done <<< "$INPUT_REPORT"
}

# Outputs: `directory`, `manifest`, `verified`, `report`, and `key`, under which to cache a new result.
convert() {
  local code=0 manifest="$INPUT_OUTPUT/manifest.json" verified=false
  mkdir -p "$STORE"
  if restored; then
    echo "restored from the cache: $CACHED_KEY"
    reports restore
  else
    rm -f -- "$SUMMARY"
    run || code=$?
    reports save
    if [[ $code == 0 && -n ${RESULT_KEY-} && -f $manifest ]]; then
      output key "$RESULT_KEY$(digest < "$manifest")"
    fi
  fi
  [[ ! -f $SUMMARY ]] || cat "$SUMMARY" >> "$GITHUB_STEP_SUMMARY"
  if [[ $code == 0 && -f $manifest ]]; then
    output directory "$INPUT_OUTPUT"
    output manifest "$manifest"
    verified="$(python3 -c 'import json, sys
print(str(bool((json.load(open(sys.argv[1]))["verification"] or {}).get("passed"))).lower())' "$manifest")"
  fi
  output verified "$verified"
  output report "${INPUT_REPORT:-$SUMMARY}"
  [[ $code == 0 ]] || echo "::error title=gptconvert::exit code $code; the summary of the job has the report"
  return "$code"
}

"$1"
