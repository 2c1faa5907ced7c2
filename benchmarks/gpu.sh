#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU: environment, the tests that need a GPU, and the benchmark.
#
#   bash benchmarks/gpu.sh                        # everything; results go to benchmarks/results/gpu.csv
#   bash benchmarks/gpu.sh --shapes 1b            # what benchmarks/gpu.py takes
#   bash benchmarks/gpu.sh --device cpu --tiny    # on any machine, to see that it works
#
# It makes .venv-gpu beside the project (about 8 GB), or takes the environment that LORICA_GPU_ENV names as it is.
# It needs Python 3.11 or later and a driver for CUDA 13; compiling with cc is optional. 8B in bf16 takes a GPU of 32 GB.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${LORICA_GPU_ENV:-.venv-gpu}
python=$folder/bin/python
if [[ " $* " != *" --device cpu "* ]]; then
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || {
        echo "gpu.sh: there is no NVIDIA GPU here, or no driver for it. To try it all the same: --device cpu --tiny" >&2
        exit 1
    }
fi

if [[ -z ${LORICA_GPU_ENV:-} && ! -e $folder/ready ]]; then
    test -x "$python" || "${PYTHON:-python3}" -m venv "$folder"
    # From the default index torch for Linux comes with CUDA and Triton; its exact version, as in the Makefile.
    "$python" -m pip install --quiet torch==2.13.0 -c constraints.txt
    "$python" -m pip install --quiet -e '.[test]' -c constraints.txt
    "$python" -m pip install --quiet --no-deps liger-kernel || echo "gpu.sh: without Liger, which did not install"
    touch "$folder/ready"
fi
"$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "seen:", torch.cuda.is_available())'

# A failing test does not keep the measurements from being taken, but it is the script's exit status.
failed=0
"$python" -m pytest tests/kernels/test_cuda_attention.py tests/kernels/test_cross_entropy.py \
    tests/kernels/test_cross_entropy_triton.py tests/kernels/test_nf4_triton.py tests/kernels/test_nf4.py \
    tests/models/test_loss.py || failed=1
"$python" benchmarks/gpu.py "$@"
exit $failed
