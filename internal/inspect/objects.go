package inspect

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
)

// RedactJSON redacts what kubectl prints with -o json. It goes by structure: of the fields of an
// object only those of keepFields keep their value, so that arguments, commands, probes, hooks,
// variables, annotations, data of Secrets and ConfigMaps, and whatever a kind may have besides,
// are left out whatever they look like. What is kept is also read as text is. Lines before the
// object, such as warnings, are dropped; what is no JSON is left out.
func (r *Redactor) RedactJSON(data []byte) string {
	leftOut := fmt.Sprintf("left out: %d bytes that are not the JSON that was asked for\n", len(data))
	start := 0
	if !bytes.HasPrefix(data, []byte("{")) {
		start = bytes.Index(data, []byte("\n{")) + 1
		if start == 0 {
			return leftOut
		}
	}
	decoder := json.NewDecoder(bytes.NewReader(data[start:]))
	decoder.UseNumber()
	var v map[string]any
	if decoder.Decode(&v) != nil {
		return leftOut
	}
	out, err := json.MarshalIndent(r.object("", "", v), "", "  ")
	if err != nil {
		return leftOut
	}
	return string(out) + "\n"
}

// object redacts a value that is in the field key of a field parent.
func (r *Redactor) object(parent, key string, v any) any {
	switch v := v.(type) {
	case nil, bool:
		return v
	case []any:
		if dropFields[key] {
			return fmt.Sprintf("%s: %d items", removed, len(v))
		}
		for i := range v {
			v[i] = r.object(parent, key, v[i])
		}
		return v
	case map[string]any:
		switch {
		case key == "managedFields":
			return removed
		case key == "annotations":
			for name := range v {
				if !keepAnnotations[name] {
					v[name] = removed
				}
			}
			return v
		case keepMaps[key]:
			for name, value := range v {
				text, ok := value.(string)
				if !ok || secretName(name) {
					v[name] = removed
					continue
				}
				v[name] = r.Redact(text)
			}
			return v
		case dropFields[key]:
			return removed
		}
		for name := range v {
			v[name] = r.object(key, name, v[name])
		}
		return v
	case string:
		// What a container leaves as its last message is its own output.
		if !keepFields[key] || key == "message" && parent == "terminated" {
			return removed
		}
		return r.Redact(v)
	default: // a number
		if !keepFields[key] {
			return removed
		}
		return v
	}
}

func words(text string) map[string]bool {
	set := map[string]bool{}
	for _, w := range strings.Fields(text) {
		set[w] = true
	}
	return set
}

var (
	// dropFields may hold anything, also below fields that are kept elsewhere.
	dropFields = words(`args command httpHeaders data stringData binaryData value env values
		volumeAttributes nodePublishSecretRef options csi flexVolume scaleIO rbd cephfs azureFile`)

	// keepMaps are maps with keys of the user's.
	keepMaps = words(`labels matchLabels nodeSelector selector limits requests capacity allocatable`)

	// keepAnnotations tell of Kubernetes' own work.
	keepAnnotations = words(`deployment.kubernetes.io/revision deployment.kubernetes.io/desired-replicas
		deployment.kubernetes.io/max-replicas deprecated.daemonset.template.generation
		kubernetes.io/config.source kubernetes.io/config.seen node.alpha.kubernetes.io/ttl
		volumes.kubernetes.io/controller-managed-attach-detach pv.kubernetes.io/bind-completed
		pv.kubernetes.io/bound-by-controller volume.kubernetes.io/selected-node
		flannel.alpha.coreos.com/backend-type flannel.alpha.coreos.com/public-ip
		flannel.alpha.coreos.com/kube-subnet-manager`)

	// keepFields are the fields of Kubernetes' objects whose values are wanted and tell nothing
	// that is a secret: identities, images, references, numbers, states and messages.
	keepFields = words(`apiVersion kind name namespace generateName uid resourceVersion generation
		creationTimestamp deletionTimestamp deletionGracePeriodSeconds finalizers controller blockOwnerDeletion
		type reason message note count action firstTimestamp lastTimestamp eventTime lastObservedTime
		reportingComponent reportingInstance reportingController component host fieldPath
		status phase lastTransitionTime lastProbeTime lastHeartbeatTime lastUpdateTime observedGeneration
		image imageID containerID imagePullPolicy ready started restartCount startedAt finishedAt exitCode signal
		nodeName serviceAccountName serviceAccount restartPolicy dnsPolicy hostNetwork hostPID hostIPC
		priority priorityClassName preemptionPolicy schedulerName runtimeClassName terminationGracePeriodSeconds
		terminationMessagePath terminationMessagePolicy activeDeadlineSeconds enableServiceLinks hostname subdomain
		key operator effect tolerationSeconds topologyKey weight timeAdded unschedulable
		containerPort hostPort port targetPort nodePort protocol appProtocol scheme path
		initialDelaySeconds periodSeconds timeoutSeconds failureThreshold successThreshold
		privileged allowPrivilegeEscalation readOnlyRootFilesystem runAsNonRoot runAsUser runAsGroup fsGroup
		supplementalGroups add drop procMount fsGroupChangePolicy
		mountPath readOnly subPath mountPropagation medium sizeLimit secretName claimName defaultMode mode
		storageClassName volumeName volumeMode accessModes persistentVolumeReclaimPolicy storage server
		podIP ip hostIP podCIDR podCIDRs qosClass startTime address
		clusterIP clusterIPs externalIPs externalName ipFamilies ipFamilyPolicy internalTrafficPolicy
		externalTrafficPolicy sessionAffinity healthCheckNodePort loadBalancerIP loadBalancerClass
		replicas readyReplicas availableReplicas unavailableReplicas updatedReplicas currentReplicas collisionCount
		minReadySeconds progressDeadlineSeconds revisionHistoryLimit maxSurge maxUnavailable podManagementPolicy
		serviceName currentRevision updateRevision parallelism completions backoffLimit completionMode suspend
		active succeeded failed completionTime ttlSecondsAfterFinished
		numberReady numberAvailable numberMisscheduled numberUnavailable desiredNumberScheduled
		currentNumberScheduled updatedNumberScheduled
		architecture operatingSystem osImage kernelVersion containerRuntimeVersion kubeletVersion kubeProxyVersion
		Port names sizeBytes providerID divisor expirationSeconds`)
)
