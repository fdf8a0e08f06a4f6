//go:build tools

// Package tools names the command that go.mod pins.
package tools

import (
	_ "helm.sh/helm/v4/cmd/helm"
)
