//go:build tools

// Package apiserver pins the Kubernetes commands that the tests run against, and Helm, which is made of the same modules. It has no
// code of its own: `go build` of an imported command, from this directory, builds it out of the Go module proxy with the sums of go.sum.
package apiserver

import (
	_ "helm.sh/helm/v3/cmd/helm"
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kube-proxy"
)
