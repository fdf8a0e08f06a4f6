// Command podling waits (pause), answers every request with its host name (serve ADDRESS), or prints what a URL answers (get URL).
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	switch {
	case len(os.Args) == 3 && os.Args[1] == "get":
		get(os.Args[2])
		return
	case len(os.Args) == 3 && os.Args[1] == "serve":
		go serve(os.Args[2])
	case len(os.Args) != 2 || os.Args[1] != "pause":
		fail("usage: podling pause | serve ADDRESS | get URL")
	}
	<-stop
}

func serve(address string) {
	name, err := os.Hostname()
	if err != nil {
		fail(err)
	}
	answer := func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, name) }
	fail(http.ListenAndServe(address, http.HandlerFunc(answer)))
}

func get(url string) {
	client := http.Client{Timeout: 5 * time.Second}
	answer, err := client.Get(url)
	if err != nil {
		fail(err)
	}
	defer answer.Body.Close()
	if _, err := io.Copy(os.Stdout, answer.Body); err != nil {
		fail(err)
	}
}

func fail(why any) {
	fmt.Fprintln(os.Stderr, why)
	os.Exit(1)
}
