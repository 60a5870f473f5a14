PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo tasks test lint clean

# The stamps are rebuilt when the dependencies change; everything else is installed in editable form.
$(VENV)/demo.stamp: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .[demo]
	touch $@

$(VENV)/dev.stamp: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .[dev]
	touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/python scripts/demo.py

# PHOTOS=DIR, with train/ and val/ of photos, adds the tasks that need photos.
tasks: $(VENV)/demo.stamp
	$(BIN)/python scripts/tasks.py $(if $(PHOTOS),--photos $(PHOTOS))

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
