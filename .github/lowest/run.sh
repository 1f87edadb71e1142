#!/usr/bin/env bash
# Installs the oldest versions that pyproject.toml allows, and runs the tests that depend on them.
#   .github/lowest/run.sh core|extras [FOLDER]
# The set that was tested is written to .github/lowest/core.txt or extras.txt; tests/test_packaging.py
# compares it with pyproject.toml. Needs uv. About 6 GB (torch 2.6 comes with CUDA).
set -euo pipefail
cd "$(dirname "$0")/../.."
which=$1 folder=${2:-$(mktemp -d)}
case $which in
  core)
    extras=()
    tests=(imports presets model samplers retrieval databases encoders checkpoints_native training) ;;
  extras)
    extras=(demo indexes eval train ray lance serve diffusers)
    tests=(indexes serving databases_lance databases_ray references references_programs
           references_pipelines evaluation_metrics evaluation_extractors watching autoencoders
           diffusers_network) ;;
  *) echo "core or extras?" >&2; exit 2 ;;
esac
uv pip compile --quiet --resolution lowest-direct --python-version 3.11 --no-annotate --no-header \
  --no-emit-index-url pyproject.toml "${extras[@]/#/--extra=}" --output-file "$folder/$which.txt"
uv venv --quiet --allow-existing --python 3.11 "$folder/$which"
uv pip install --quiet --python "$folder/$which/bin/python" --requirement "$folder/$which.txt" \
  pytest hypothesis scikit-learn
# This test builds an index with a newer interface of LanceDB; retrodiff only reads it.
files=("${tests[@]/#/tests/test_}")
files=("${files[@]/%/.py}")
PYTHONPATH=$PWD "$folder/$which/bin/python" -m pytest -q -p no:cacheprovider "${files[@]}" \
  --deselect tests/test_databases_lance.py::test_a_vector_index_is_used_and_ranked_again
cp "$folder/$which.txt" ".github/lowest/$which.txt"
