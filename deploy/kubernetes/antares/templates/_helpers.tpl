{{/* Prefix of all names. */}}
{{- define "antares.fullname" -}}
{{- default .Release.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels of everything; the argument is (dict "root" $ "component" "gateway" "pool" "main"). */}}
{{- define "antares.selector" -}}
app.kubernetes.io/name: antares
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .pool }}
antares/pool: {{ . }}
{{- end }}
{{- with .shard }}
antares/shard: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "antares.labels" -}}
{{ include "antares.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end -}}

{{- define "antares.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* The pools of engines, each merged over engineDefaults: {"pools": [...]}. */}}
{{- define "antares.pools" -}}
{{- $pools := list -}}
{{- range .Values.engines -}}
{{- $pool := mergeOverwrite (deepCopy $.Values.engineDefaults) (deepCopy .) -}}
{{- $pools = append $pools $pool -}}
{{- end -}}
{{- dict "pools" $pools | toYaml -}}
{{- end -}}

{{/* Name of a pool's model in the API; the argument is the pool. */}}
{{- define "antares.servedModel" -}}
{{- .servedModelName | default .model -}}
{{- end -}}

{{- define "antares.keysSecret" -}}
{{- .Values.keys.secret | default (printf "%s-keys" (include "antares.fullname" .)) -}}
{{- end -}}

{{/* The gateway's configuration file. */}}
{{- define "antares.config" -}}
{{- $name := include "antares.fullname" . -}}
{{- $config := deepCopy .Values.gateway.config -}}
{{- $server := dict "host" "0.0.0.0" "port" 8100 "drain_s" .Values.drainSeconds -}}
{{- if .Values.keys.anonymous -}}
{{- $_ := set $server "allow_anonymous" true -}}
{{- else -}}
{{- $_ := set $config "keys_file" "/etc/antares/keys/keys.json" -}}
{{- end -}}
{{- $_ := set $config "server" (mergeOverwrite (deepCopy (default dict $config.server)) $server) -}}
{{- if eq .Values.autoscaling.signal "wanted" -}}
{{- $wanted := dict "enabled" true -}}
{{- range (include "antares.pools" . | fromYaml).pools -}}
{{- /* The gateway's default is 64. */ -}}
{{- if and .autoscaling.enabled (gt (int .autoscaling.max) (int (default 64 $wanted.max_replicas))) -}}
{{- $_ := set $wanted "max_replicas" (int .autoscaling.max) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $config "wanted_replicas" (mergeOverwrite $wanted (default dict $config.wanted_replicas)) -}}
{{- end -}}
{{- $engines := list -}}
{{- range (include "antares.pools" . | fromYaml).pools -}}
{{- $most := int (ternary .autoscaling.max .replicas .autoscaling.enabled) -}}
{{- $engine := dict "kind" "http" "name" .name "base_url" (printf "http://%s-%s:8000" $name .name) -}}
{{- /* Twice as many, because old pods drain while new ones start. */ -}}
{{- $discover := dict "every_s" $.Values.gateway.discoverSeconds "max_engines" (min 256 (mul 2 $most)) -}}
{{- $_ := set $engine "discover" $discover -}}
{{- $_ := set $engine "max_num_seqs" .maxNumSeqs -}}
{{- $_ := set $engine "max_num_batched_tokens" .maxNumBatchedTokens -}}
{{- $_ := set $engine "max_model_len" .maxModelLen -}}
{{- if .apiKey.secret -}}
{{- $_ := set $engine "api_key_env" (include "antares.apiKeyVariable" .) -}}
{{- end -}}
{{- if eq .kind "simulated" -}}
{{- $_ := set $engine "send_slo" false -}}
{{- else if .report.secret -}}
{{- $_ := set $engine "report" (dict "port" 9410 "key_env" (include "antares.reportKeyVariable" .)) -}}
{{- end -}}
{{- $engines = append $engines (mergeOverwrite $engine .gateway) -}}
{{- end -}}
{{- $_ := set $config "engines" $engines -}}
{{- if .Values.predictor.enabled -}}
{{- $_ := set $config "predictor" (mergeOverwrite (dict "url" (printf "http://%s-predictor:8101" $name)) (default dict $config.predictor)) -}}
{{- else -}}
{{- $_ := set $config "predictor" (dict "enabled" false) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* Environment variable of the gateway with the API key of a pool's engines. */}}
{{- define "antares.apiKeyVariable" -}}
{{- printf "ENGINE_KEY_%s" (.name | upper | replace "-" "_") -}}
{{- end -}}

{{/* Environment variable of the gateway with the key of the report channel of a pool's engines. */}}
{{- define "antares.reportKeyVariable" -}}
{{- printf "REPORT_KEY_%s" (.name | upper | replace "-" "_") -}}
{{- end -}}

{{- define "antares.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end -}}

{{- define "antares.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: { type: RuntimeDefault }
{{- end -}}

{{/*
What a pool is scaled by, as PromQL: the requests per second for its model, or the replicas that the gateways want.
Both return nothing, not 0, while no gateway is scraped. The autoscaler then keeps the pool as it is.
*/}}
{{- define "antares.signal" -}}
{{- $job := printf "namespace=%q,job=\"%s-gateway\"" .root.Release.Namespace (include "antares.fullname" .root) -}}
{{- $model := include "antares.servedModel" .pool | quote -}}
{{- $scraped := printf "count(up{%s} == 1)" $job -}}
{{- if eq .root.Values.autoscaling.signal "wanted" -}}
{{- /* Nothing while a gateway has no number: the sum of the others is too small. To estimate its share instead would add
engines at each rollout, when new gateways have had no traffic yet. */ -}}
{{- $wanted := printf "antares_wanted_replicas{%s,model=%s}" $job $model -}}
sum({{ $wanted }}) and count({{ $wanted }}) >= {{ $scraped }}
{{- else -}}
(sum(rate(antares_requests_total{{ printf "{%s,model=%s}" $job $model }}[2m])) or vector(0)) and {{ $scraped }}
{{- end -}}
{{- end -}}

{{- define "antares.signalName" -}}
{{ ternary "antares_pool_wanted_replicas" "antares_pool_requests_per_second" (eq .Values.autoscaling.signal "wanted") }}
{{- end -}}

{{- define "antares.dnsEgress" -}}
- ports:
    - { port: 53, protocol: UDP }
    - { port: 53, protocol: TCP }
{{- end -}}
