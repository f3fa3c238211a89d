#!/usr/bin/env bash
# The steps of action.yml: keys, install and convert. Inputs are environment variables INPUT_…, and are never evaluated.
set -euo pipefail

fail() { # message, exit code
    echo "::error title=gptconvert::$1"
    exit "$2"
}

put() { # name and value of an output; a name of the workflow's own cannot end the value early
    local end="end-$RANDOM$RANDOM$RANDOM"
    printf '%s<<%s\n%s\n%s\n' "$1" "$end" "$2" "$end" >>"$GITHUB_OUTPUT"
}

digest() { # of the standard input
    python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

reports() { # paths of all reports
    printf '%s\n' "$INPUT_REPORT.md" "$INPUT_REPORT.xml" "$INPUT_REPORT.json"
}

keys() {
    local platform constraints given
    platform=$(python -c 'import platform, sys; print(sys.platform, platform.machine(), *sys.version_info[:2], sep="-")')
    constraints=$(cat "$GITHUB_ACTION_PATH/constraints.txt" "$GITHUB_ACTION_PATH/pyproject.toml" | digest)
    given=$(printf '%s\0' "$INPUT_SOURCE" "$INPUT_COMMAND" "$INPUT_TO" "$INPUT_OUTPUT" "$INPUT_ARGS" "$INPUT_REPORT" |
        digest)
    put pip-directory "$(python -m pip cache dir)"
    put pip-key "gptconvert-pip-$platform-$constraints-$(printf '%s' "$INPUT_EXTRAS" | digest)"
    put result-key "gptconvert-result-$platform-$given-"
    put result-paths "$INPUT_OUTPUT"$'\n'"$(reports)"
}

install() {
    local package=$GITHUB_ACTION_PATH
    [[ -z $INPUT_EXTRAS ]] || package+="[$INPUT_EXTRAS]"
    python -m pip install --disable-pip-version-check --constraint "$GITHUB_ACTION_PATH/constraints.txt" "$package"
}

convert() {
    [[ -n $INPUT_SOURCE ]] || fail "the input source is missing" 2
    local words=() report line token code=0 start manifest=$INPUT_OUTPUT/manifest.json
    while IFS= read -r line; do
        [[ -z $line ]] || words+=("$line")
    done <<<"$INPUT_ARGS"
    while IFS= read -r report; do
        words+=(--report "$report")
    done < <(reports)
    start=$(mktemp)
    # Names in a checkpoint must not be taken for commands of the workflow.
    token=stop-$RANDOM$RANDOM$RANDOM
    echo "::stop-commands::$token"
    python -m gptconvert "$INPUT_COMMAND" --to "$INPUT_TO" --output "$INPUT_OUTPUT" --reuse --force \
        "${words[@]}" -- "$INPUT_SOURCE" || code=$?
    echo "::$token::"
    put report "$INPUT_REPORT.md"
    # A cached report says nothing about a run that failed without writing one.
    if [[ $INPUT_SUMMARY == true && -f $INPUT_REPORT.md && ($code == 0 || $INPUT_REPORT.md -nt $start) ]]; then
        head -c 1000000 "$INPUT_REPORT.md" >>"$GITHUB_STEP_SUMMARY" # a step may add 1 MiB
    fi
    [[ $code == 0 ]] || fail "exit code $code; the message is above, and in $INPUT_REPORT.md" "$code"
    put directory "$INPUT_OUTPUT"
    put manifest "$manifest"
    put sha256sums "$INPUT_OUTPUT/SHA256SUMS"
    put manifest-digest "$(digest <"$manifest")"
    put reused "$([[ $manifest -nt $start ]] && echo false || echo true)"
    put verified "$(python -c 'import json, sys
print("true" if json.load(open(sys.argv[1]))["verification"] else "false")' "$manifest")"
}

case ${1-} in
keys | install | convert) "$1" ;;
*) fail "usage: action.sh keys|install|convert" 2 ;;
esac
