PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo tasks test test-slow lint docs clean

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

$(VENV)/docs.stamp: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .[docs]
	touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/python scripts/demo.py

# PHOTOS=DIR, with train/ and val/ of photos, adds the tasks that need photos.
tasks: $(VENV)/demo.stamp
	$(BIN)/python scripts/tasks.py $(if $(PHOTOS),--photos $(PHOTOS))

# One thread a process: the models of the tests are too small to share. A file's tests share what they trained.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(VENV)/dev.stamp
	$(PYTEST)

# The variants that `test` leaves out.
test-slow: $(VENV)/dev.stamp
	$(PYTEST) -m slow

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .

# A static site in site/, without a warning and without anything that a browser would fetch from elsewhere.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache
