//! The control plane: etcd and kube-apiserver, the controllers, the scheduler.

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command},
};

use anyhow::Result;

use super::{Programs, layout, network, node::Node};
use crate::{
    apiserver::{ApiServer, Seat, User, spawn},
    world::Namespace,
};

pub(super) struct ControlPlane {
    pub(super) server: ApiServer,
    controllers: Vec<Child>,
}

impl ControlPlane {
    pub(super) fn start(programs: &Programs, namespace: &Namespace, nodes: u8) -> Result<Self> {
        let seat = Seat { address: network::SERVERS.into(), namespace: Some(PathBuf::from(namespace.path())) };
        let kubelets: String = (1..=nodes).map(Node::token_line).collect();
        let server = ApiServer::start_whole(programs.servers.clone(), seat, layout::servers(), &kubelets)?;
        let mut plane = Self { server, controllers: Vec::new() };
        plane.start_controllers(programs, namespace)?;
        Ok(plane)
    }

    fn start_controllers(&mut self, programs: &Programs, namespace: &Namespace) -> Result<()> {
        let kubeconfig = self.server.kubeconfig(User::Admin, self.server.address())?;
        let command = |program: &PathBuf| {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net={}", namespace.path())).arg(program);
            command.arg("--kubeconfig").arg(&kubeconfig).args(["--leader-elect=false", "--bind-address=127.0.0.1"]);
            command.args(["--kube-api-qps=200", "--kube-api-burst=400"]);
            command
        };
        let mut controllers = command(&programs.controller_manager);
        controllers
            .arg("--service-account-private-key-file")
            .arg(self.server.key())
            .arg("--root-ca-file")
            .arg(self.server.authority())
            .arg("--use-service-account-credentials=false")
            .arg(format!("--cert-dir={}", layout::servers().join("controllers").display()));
        self.controllers.push(spawn(controllers, &layout::logs().join("kube-controller-manager.log"))?);
        let scheduler = command(&programs.scheduler);
        self.controllers.push(spawn(scheduler, &layout::logs().join("kube-scheduler.log"))?);
        Ok(())
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.server.address()
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        for mut child in self.controllers.drain(..) {
            // What is gone already needs no ending.
            let _gone = child.kill();
            let _gone = child.wait();
        }
    }
}
