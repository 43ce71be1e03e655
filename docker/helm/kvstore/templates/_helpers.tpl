{{- define "kvstore.labels" -}}
app.kubernetes.io/name: kvstore
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "kvstore.selector" -}}
app.kubernetes.io/name: kvstore
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kvstore.name" -}}
{{- printf "%s-kvstore" .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "kvstore.token" -}}
{{- if .Values.tokenSecret }}{{ .Values.tokenSecret }}{{ else if .Values.createToken }}{{ include "kvstore.name" . }}-token{{ end }}
{{- end }}

{{/* MiB of a size such as 16GiB. */}}
{{- define "kvstore.mib" -}}
{{- $number := regexFind "^[0-9]+" . | int64 }}
{{- $unit := regexFind "[MGT]iB$" . }}
{{- if eq $unit "TiB" }}{{ mul $number 1048576 }}{{ else if eq $unit "GiB" }}{{ mul $number 1024 }}{{ else }}{{ $number }}{{ end }}
{{- end }}
