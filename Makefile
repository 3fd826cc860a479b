# make lab      open the lessons in JupyterLab      (make lab ARGS=--no-browser)
# make test     every check that CI runs
# make docs     the website, into _docs             (without Quarto: a plain one, by pandoc alone)
# make bench    measurements beside other libraries; what needs a GPU says so and is left out
# make outputs  run every lesson and store its outputs
# make checkpoint  train the models that ship: the base model for eight minutes, the others for five
# make readme   README.md from nbs/index.ipynb
# make clean    remove what was built, but not .venv

PYTHON  ?= python3
LESSONS ?= nbs
BIN     := .venv/bin
READY   := .venv/.ready
# A notebook may import torch before the course: threads that wait spin shortly from the start.
SPIN    := GOMP_SPINCOUNT=1000 KMP_BLOCKTIME=0
SPIN    := $(if $(OMP_WAIT_POLICY)$(GOMP_SPINCOUNT)$(KMP_BLOCKTIME),,$(SPIN))
ROOT    := $(if $(filter 0,$(shell id -u)),--allow-root)

lab: $(READY)
	$(SPIN) $(BIN)/jupyter lab --ServerApp.root_dir="$(LESSONS)" --LabApp.default_url=/lab/tree/00_start.ipynb $(ROOT) $(ARGS)

# Two lessons, or two files of tests, at a time, each with one thread, use two cores.
test: $(READY)
	$(BIN)/pytest tests/test_in_sync.py
	$(SPIN) OMP_NUM_THREADS=1 $(BIN)/nbdev_test --timing --n_workers 2
	$(SPIN) OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_rerun.py -n 2
	$(SPIN) OMP_NUM_THREADS=1 $(BIN)/pytest tests --ignore tests/test_in_sync.py --ignore tests/test_rerun.py -n 2 --dist loadfile

docs: $(READY)
	$(BIN)/python tools/pages.py --render

bench: $(READY)
	for script in benchmarks/*.py; do echo "== $$script"; $(SPIN) $(BIN)/python "$$script" || [ $$? = 2 ] || exit 1; done

outputs: $(READY)
	$(SPIN) $(BIN)/python tools/lessons.py --store

checkpoint: $(READY)
	$(SPIN) $(BIN)/python benchmarks/world_floor.py --tokens 15 --seeds 1 --save llm_course/assets
	$(SPIN) $(BIN)/python experiments/sft.py --save llm_course/assets
	$(SPIN) $(BIN)/python experiments/reward.py --save llm_course/assets
	$(SPIN) $(BIN)/python experiments/align.py --save llm_course/assets

readme: $(READY)
	$(BIN)/python tools/readme.py

clean:
	rm -rf build dist _docs _proc .cache .pytest_cache .ruff_cache .hypothesis *.egg-info

$(READY): settings.ini setup.py pyproject.toml constraints.txt tools/reference-data.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "llm-course needs" \
	  "Python 3.10 or newer, and $(PYTHON) is not. Try, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r tools/reference-data.txt
	$(BIN)/jupyter labextension disable "@jupyterlab/apputils-extension:announcements" 2>/dev/null
	@touch $@

.PHONY: lab test docs bench outputs checkpoint readme clean
