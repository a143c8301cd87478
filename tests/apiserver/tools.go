//go:build tools

// Package apiserver pins the Kubernetes commands that the tests run against. It has no code of its own: `go build` of an
// imported command, from this directory, builds it out of the Go module proxy with the sums of go.sum.
package apiserver

import (
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kube-proxy"
)
