# The converter on a CPU: convert, verify, restore, relayout, push.
#
#     docker build -f examples/docker/converter.Dockerfile -t nvfp4-prep:0.2.0 .
FROM python:3.13-slim
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.11"
# What pyproject.toml requires, without flashinfer-python: nothing here calls a GPU kernel. FlashInfer would bring numpy,
# without which torch warns in every command that it cannot initialize it.
RUN pip install --no-cache-dir numpy "safetensors>=0.5" "huggingface-hub>=1.31" "tqdm>=4.66" "click>=8.2"
COPY . /src
RUN pip install --no-cache-dir --no-deps /src
USER 1000
ENV HOME=/tmp
ENTRYPOINT ["nvfp4-prep"]
CMD ["--help"]
