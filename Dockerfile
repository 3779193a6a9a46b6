# Soma in a container: docker build -t soma . && docker run --rm -v soma-runs:/work/runs soma run recipes/quickstart.yaml
FROM python:3.11-slim

# A C and C++ compiler for torch.compile; Python's headers are in the image.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

# The CPU build of torch is a tenth of the size. For a GPU: --build-arg TORCH_INDEX=https://pypi.org/simple
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/soma
COPY requirements.lock ./
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY soma ./soma
RUN pip install --no-cache-dir --no-deps .

RUN useradd --create-home --uid 1000 soma \
    && mkdir -p /work/runs /home/soma/.cache \
    && chown -R soma:soma /work /home/soma
COPY --chown=soma:soma recipes /work/recipes
USER soma
WORKDIR /work
VOLUME /work/runs
EXPOSE 8000
ENTRYPOINT ["soma"]
CMD ["--help"]
