# make demo    learns a held-out action on the bundled toy model and paints it: output/demo.png and its scores
# make test    all tests, two files at a time, the browser's first because they take longest (those that need ComfyUI or
#              chromium are skipped, with the reason, where it is missing)
# Both set up everything in .venv first; that takes minutes once and nothing afterwards.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CHROMIUM := $(shell for name in chromium chromium-browser google-chrome; do command -v $$name || true; done)

# $COMFYUI_PATH, when set, is the only place looked at; else the folders around this one, then ~/comfy/ComfyUI.
COMFYUI := $(shell for place in $${COMFYUI_PATH:-.. ../.. $$HOME/comfy/ComfyUI}; do \
	if [ -f "$$place/main.py" ] && [ -f "$$place/comfy/sd.py" ]; then cd "$$place" && pwd; break; fi; done)
COMFYUI_REQUIREMENTS := $(if $(COMFYUI),$(COMFYUI)/requirements.txt)
ifneq ($(COMFYUI),)
export COMFYUI_PATH := $(COMFYUI)
endif
# One thread: on few cores, two of torch's threads wait for each other longer than they work.
export OMP_NUM_THREADS := 1

# Another ComfyUI, or changed requirements, mean another set-up.
READY := $(VENV)/.ready$(subst /,-,$(COMFYUI))

.PHONY: demo test test-kernels test-matrix lint locales workflows thumbnails

demo: $(READY)
	$(PY) -m concept_atelier.benchmarks.demo

test: $(READY)
	@[ -n "$(COMFYUI)" ] || echo "ComfyUI was not found (COMFYUI_PATH, around this folder, ~/comfy/ComfyUI):" \
		"the tests of nodes, server and browser are skipped."
	@[ -n "$(CHROMIUM)" ] || echo "No chromium was found: the browser tests are skipped."
	$(PY) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

test-kernels: $(READY)
	$(PY) -m pytest tests/kernels

# Developers: what depends on transformers, with the oldest supported, the last of 4.x and the newest. Takes minutes and
# the network; the environments are thrown away.
test-matrix: $(READY)
	$(PY) tests/matrix/run.py

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Developers: files that are made from the nodes. Review what changed before committing it.
locales: $(READY)
	$(PY) tests/nodes/write_locales.py

workflows: $(READY)
	$(PY) tests/browser/build_workflows.py

thumbnails: $(READY)
	$(PY) tests/browser/build_workflows.py --thumbnails

$(READY): pyproject.toml requirements.txt $(COMFYUI_REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install torch==2.14.1 torchvision==0.29.1 -e ".[groundingdino,train,test]" \
		$(COMFYUI_REQUIREMENTS:%=-r %)
	@touch $@
