# Ray's own image, in which nobody is root, with avray in it:
#   docker build -t avray:cpu .
#   docker build -t avray:gpu --build-arg KIND=gpu .
#   docker run --rm --shm-size=2g -v $PWD/runs:/home/ray/runs avray:cpu python avray/pipelines/train.py
# KIND=cpu takes the gigabytes of CUDA that PyPI's torch brings along, unless TORCH_INDEX names an index of CPU builds.
ARG RAY=2.60.0
ARG KIND=cpu
FROM rayproject/ray:${RAY}-py311-${KIND}

ARG TORCH_INDEX=
ARG EXTRAS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 RAY_USAGE_STATS_ENABLED=0
USER ray
WORKDIR /home/ray
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.9,<2.14"
COPY --chown=ray:users . avray
RUN pip install -e "avray${EXTRAS:+[$EXTRAS]}" "s3fs>=2025.3"
