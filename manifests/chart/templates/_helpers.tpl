{{- define "proxy-agent.labels" -}}
app.kubernetes.io/name: proxy-agent
app.kubernetes.io/part-of: proxy-agent
{{- end }}

{{- define "proxy-agent.image" -}}
{{- $tools := has .Values.mode (list "nftables" "iptables" "ipvs") -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default (printf "%s%s" $.Chart.AppVersion (ternary "-tools" "" $tools)) }}
{{- end -}}
{{- end -}}
{{- end }}
