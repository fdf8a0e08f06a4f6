{{- define "spillway.labels" -}}
app.kubernetes.io/part-of: spillway
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- /* Labels of a pod of a part: (list $ "gateway"). The next ones are in it. */}}
{{- define "spillway.podLabels" -}}
app.kubernetes.io/name: spillway-{{ index . 1 }}
{{ include "spillway.labels" (index . 0) }}
{{- end }}

{{- /* What selects the pods of a part. */}}
{{- define "spillway.selector" -}}
app.kubernetes.io/name: spillway-{{ index . 1 }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
{{- end }}

{{- /* The image of a part: (list $ "gateway" .Values.gateway.image) */}}
{{- define "spillway.image" -}}
{{- $root := index . 0 -}}
{{- $image := $root.Values.image -}}
{{- $ours := printf "spillway-%s:%s" (index . 1) ($image.tag | default $root.Chart.AppVersion) -}}
{{- index . 2 | default (ternary (printf "%s/%s" $image.registry $ours) $ours (ne $image.registry "")) -}}
{{- end }}

{{- define "spillway.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* Pod Security "restricted", in two halves: of the pod, and of each container. */}}
{{- define "spillway.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "spillway.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "spillway.gateway" -}}
{{ .Release.Name }}-gateway
{{- end }}

{{- define "spillway.gatewayAddress" -}}
{{ include "spillway.gateway" . }}.{{ .Release.Namespace }}.svc:{{ .Values.gateway.service.port }}
{{- end }}

{{- define "spillway.tlsSecret" -}}
{{ .Values.gateway.tls.secret | default (printf "%s-gateway-tls" .Release.Name) }}
{{- end }}

{{- /* The gateway's file of limits; empty where none are set. */}}
{{- define "spillway.limits" -}}
{{- with .Values.gateway.limits.default }}
[default]
{{- include "spillway.limitsTable" . }}
{{- end }}
{{- range $tenant, $stated := .Values.gateway.limits.tenants }}
[tenant.{{ quote $tenant }}]
{{- include "spillway.limitsTable" $stated }}
{{- end }}
{{- end }}

{{- define "spillway.limitsTable" }}
{{- range $key, $value := . }}
{{ snakecase $key }} = {{ has $key (list "callsPerSecond" "weight") | ternary ($value | float64) ($value | int64) }}
{{- end }}
{{- end }}
