# vLLM 0.33 with the plugin, for GPUs of compute capability 10.x.
#
#     docker build -f examples/docker/vllm.Dockerfile -t vllm-nvfp4-prep:0.33.0 .
FROM vllm/vllm-openai:v0.33.0
COPY . /src
# Without dependencies: vLLM's image has them, in the versions that it was tested with.
RUN python3 -m pip install --no-cache-dir --no-deps /src
ENTRYPOINT ["vllm", "serve"]
