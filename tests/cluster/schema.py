"""The fields of KubeRay's v1 kinds, and those of Kubernetes that the files of `cluster/` use, as a closed JSON schema.

KubeRay's own fields are all here (apis/ray/v1 of KubeRay 1.6); of the large kinds of Kubernetes (PodSpec, Container)
only what the files use. Any other key is refused, which a misspelt one is in particular.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"type": ["string", "integer"], "pattern": r"^[0-9.]+(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
ANY: Schema = {}


def one_of(*words: str) -> Schema:
    """One of these words."""
    return {"enum": list(words)}


def closed(needed: str = "", **fields: Schema) -> Schema:
    """An object with no other keys than `fields`. `needed` are the names, parted by spaces, that must be there."""
    return {"type": "object", "properties": fields, "required": needed.split(), "additionalProperties": False}


def some(item: Schema) -> Schema:
    """A list with at least one item."""
    return {"type": "array", "items": item, "minItems": 1}


NAMED = closed("name", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)

RESOURCES = closed(
    "requests limits",
    **{kind: {"type": "object", "additionalProperties": QUANTITY} for kind in ("requests", "limits")},
)

CONTAINER = closed(
    "name image resources securityContext",
    name=TEXT, image=TEXT, resources=RESOURCES,
    ports=some(closed("containerPort", containerPort=COUNT, name=TEXT)),
    env=some(closed("name", name=TEXT, value=TEXT)),
    volumeMounts=some(closed("name mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG, subPath=TEXT)),
    securityContext=closed(
        "allowPrivilegeEscalation capabilities",
        allowPrivilegeEscalation={"const": False}, capabilities=closed("drop", drop={"const": ["ALL"]}),
    ),
)  # fmt: skip

POD = closed(
    "spec",
    metadata=closed("labels", labels=TEXTS, annotations=TEXTS),
    spec=closed(
        "containers securityContext automountServiceAccountToken",
        containers=some(CONTAINER), automountServiceAccountToken={"const": False},
        restartPolicy=one_of("Always", "OnFailure", "Never"), terminationGracePeriodSeconds=COUNT,
        securityContext=closed(
            "runAsNonRoot",
            runAsNonRoot={"const": True}, runAsUser=COUNT, fsGroup=COUNT,
            seccompProfile=closed("type", type=one_of("RuntimeDefault", "Localhost")),
        ),
        volumes=some(
            closed(
                "name", name=TEXT, persistentVolumeClaim=closed("claimName", claimName=TEXT),
                configMap=closed("name", name=TEXT),
            )
        ),
        nodeSelector=TEXTS,
    ),
)  # fmt: skip

GROUP = {"rayStartParams": TEXTS, "template": POD, "resources": TEXTS, "labels": TEXTS}

CLUSTER = closed(
    "headGroupSpec",
    suspend=FLAG, managedBy=TEXT, autoscalerOptions=ANY, headServiceAnnotations=TEXTS, enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=ANY, rayVersion=TEXT, upgradeStrategy=ANY,
    authOptions=closed("mode", mode=one_of("disabled", "token")),
    headGroupSpec=closed(
        "rayStartParams template", headService=ANY, enableIngress=FLAG,
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"), **GROUP,
    ),
    workerGroupSpecs=some(
        closed(
            "groupName minReplicas maxReplicas rayStartParams template",
            suspend=FLAG, groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT,
            idleTimeoutSeconds=COUNT, scaleStrategy=ANY, numOfHosts=COUNT, **GROUP,
        )
    ),
)  # fmt: skip

JOB = closed(
    "entrypoint rayClusterSpec",
    activeDeadlineSeconds=COUNT, backoffLimit=COUNT, rayClusterSpec=CLUSTER, submitterPodTemplate=POD, metadata=TEXTS,
    clusterSelector=TEXTS, submitterConfig=closed(backoffLimit=COUNT), managedBy=TEXT, deletionStrategy=ANY,
    entrypoint=TEXT, runtimeEnvYAML=TEXT, jobId=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=TEXT, entrypointNumCpus=NUMBER, entrypointNumGpus=NUMBER, ttlSecondsAfterFinished=COUNT,
    preRunningDeadlineSeconds=COUNT, shutdownAfterJobFinishes=FLAG, suspend=FLAG,
)  # fmt: skip

SELECTOR = closed(matchLabels=TEXTS)
PEERS = some(
    closed(
        podSelector=SELECTOR, namespaceSelector=SELECTOR, ipBlock=closed("cidr", cidr=TEXT, **{"except": some(TEXT)})
    )
)
PORTS = some(closed("protocol port", protocol=one_of("TCP", "UDP"), port=COUNT))

POLICY = closed(
    "podSelector policyTypes",
    podSelector=SELECTOR, policyTypes=some(one_of("Ingress", "Egress")),
    ingress=some(closed("from", **{"from": PEERS, "ports": PORTS})), egress=some(closed("to", to=PEERS, ports=PORTS)),
)  # fmt: skip

CLAIM = closed(
    "accessModes resources",
    accessModes=some(one_of("ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany")), storageClassName=TEXT,
    resources=closed("requests", requests=closed("storage", storage=QUANTITY)),
)  # fmt: skip

KINDS = {
    ("ray.io/v1", "RayCluster"): CLUSTER,
    ("ray.io/v1", "RayJob"): JOB,
    ("networking.k8s.io/v1", "NetworkPolicy"): POLICY,
    ("v1", "PersistentVolumeClaim"): CLAIM,
}


def of(document: Schema) -> Schema:
    """The schema of a whole document, by its `apiVersion` and `kind`."""
    names = (document["apiVersion"], document["kind"])
    return closed("apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=NAMED, spec=KINDS[names])
